"""Statement embeddings: a text in, a vector out."""

from runtimes.pipelines.statements.pipeline import StatementsPipeline

PIPELINES = {"statements": StatementsPipeline}

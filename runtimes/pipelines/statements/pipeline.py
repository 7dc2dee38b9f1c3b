"""Statement embeddings: a theorem-like statement as text in, a unit vector out."""

from collections.abc import Sequence
from typing import Any

from runtimes.errors import InputError
from runtimes.tensors import Tensors
from runtimes.text_pipeline import TextPipeline, padded, read_texts

TOKENS_MIN = 2  # of the model's axis


class StatementsPipeline(TextPipeline):
    """A request is `{"text": ...}`, plain or LaTeX; an answer is `{"vector": [...]}`.

    Of a longer text, the first `max_tokens` are read.
    """

    embeds = True
    tokenizer = "tokenizer.json"
    max_tokens = "max_tokens"
    keep = "first"

    def encode(self, requests: Sequence[Any]) -> Tensors:
        """`input_ids` and `attention_mask`, int64 [batch, tokens]."""
        texts = read_texts(requests)
        for i, text in enumerate(texts):
            if not text.strip():
                raise InputError(f"request {i}, text: expected a statement, found nothing but blanks")
        ids, mask = padded(self.tokens.rows(texts), self.tokens.pad, TOKENS_MIN)
        return {"input_ids": ids, "attention_mask": mask}

    def example(self) -> Any:
        return {"text": "Let $R$ be a Noetherian ring. Then every ideal of $R$ is finitely generated."}

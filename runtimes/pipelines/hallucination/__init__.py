"""Hallucination detection: an answer with its sources in, scores of its parts out."""

from runtimes.pipelines.hallucination.aarf import MitigatedPipeline
from runtimes.pipelines.hallucination.detector import HallucinationPipeline
from runtimes.pipelines.hallucination.generator import GeneratorPipeline
from runtimes.pipelines.hallucination.scorer import ScorerPipeline

PIPELINES = {
    "hallucination": HallucinationPipeline,
    "hallucination_aarf": MitigatedPipeline,
    "hallucination_generator": GeneratorPipeline,
    "hallucination_scorer": ScorerPipeline,
}

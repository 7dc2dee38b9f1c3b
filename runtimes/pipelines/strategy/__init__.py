"""Emotional-support strategy prediction: a dialogue in, a strategy out; fused, and in parts."""

from runtimes.pipelines.strategy.emotion import EmotionPipeline
from runtimes.pipelines.strategy.encoder import EncoderPipeline
from runtimes.pipelines.strategy.fused import StrategyPipeline
from runtimes.pipelines.strategy.graph import GraphPipeline
from runtimes.pipelines.strategy.parser import ParserPipeline

PIPELINES = {
    "strategy": StrategyPipeline,
    "strategy_emotion": EmotionPipeline,
    "strategy_encoder": EncoderPipeline,
    "strategy_graph": GraphPipeline,
    "strategy_parser": ParserPipeline,
}

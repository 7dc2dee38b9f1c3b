"""The trained part of `strategy`: a dialogue whose context and emotions are known in, the next strategy out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.errors import InputError
from runtimes.pipeline import Pipeline, Schema, array, refuse_no_requests
from runtimes.pipelines.strategy.dialogue import (
    EMOTIONS,
    EXAMPLE,
    STRATEGIES,
    dialogue_schema,
    emotion_tensors,
    graph_tensors,
    read_answers,
    read_dialogue,
)
from runtimes.tensors import Tensors


class GraphPipeline(Pipeline):
    """A request is that of `strategy` with `emotion_logits` for every turn and `context`, the encoder's vector."""

    def __init__(self, config: Mapping[str, Any], assets: Path) -> None:
        super().__init__(config, assets)
        self.strategies = STRATEGIES[config["labels"]]

    def encode(self, requests: Sequence[Any]) -> Tensors:
        refuse_no_requests(requests)
        contexts, dialogues = [], []
        for i, request in enumerate(requests):
            if not isinstance(request, dict) or "context" not in request:
                raise InputError(f"request {i}: expected an object with a 'context', found none")
            contexts.append(self._context(request["context"], i))
            rest = {name: value for name, value in request.items() if name != "context"}
            dialogue = read_dialogue(rest, self.strategies, f"request {i}")
            if dialogue.emotion_logits is None:
                raise InputError(f"request {i}: expected 'emotion_logits', found none; run strategy_emotion")
            if dialogue.edges is None and self.config["parser"] == "sddp":
                raise InputError(f"request {i}: expected 'edges', found none; run strategy_parser")
            dialogues.append(dialogue.newest(self.config["max_turns"]))
        emotions = emotion_tensors(dialogues)["emotion_logits"]
        graph = graph_tensors(dialogues, len(self.strategies))
        return {"context": np.stack(contexts), "emotion_logits": emotions, **graph}

    def _context(self, numbers: Any, row: int) -> np.ndarray:
        width = self.config["context_width"]
        if not isinstance(numbers, list) or len(numbers) != width or any(type(x) not in (int, float) for x in numbers):
            raise InputError(f"request {row}, context: expected {width} numbers, found {ascii(numbers)[:60]}")
        return np.array(numbers, np.float32)

    def decode(self, outputs: Mapping[str, np.ndarray]) -> list[Any]:
        return read_answers(outputs, self.strategies)

    def schema(self) -> Schema:
        schema, width = dialogue_schema(self.strategies), self.config["context_width"]
        schema["properties"]["context"] = array({"type": "number"}, width, width)
        schema["required"].append("context")
        return schema

    def example(self) -> Any:
        logits = [[0.0] * len(EMOTIONS) for _ in EXAMPLE["turns"]]
        return {**EXAMPLE, "emotion_logits": logits, "context": [0.0] * self.config["context_width"]}

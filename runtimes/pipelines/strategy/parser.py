"""The frozen discourse parser of `strategy`: turns in, for each pair of them the scores of all relations out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.errors import InputError
from runtimes.pipeline import Pipeline, Schema, refuse_no_requests
from runtimes.pipelines.strategy.dialogue import EXAMPLE, STRATEGIES, dialogue_schema, read_dialogue
from runtimes.pipelines.strategy.discourse import best_trees, load_pair_tokens, pair_tensors
from runtimes.tensors import Tensors, require_finite


class ParserPipeline(Pipeline):
    """A request is that of `strategy` without edges; an answer is `{"edges": [[head, tail, relation], ...]}`."""

    def __init__(self, config: Mapping[str, Any], assets: Path) -> None:
        super().__init__(config, assets)
        self.strategies = STRATEGIES[config["labels"]]
        self.tokens = load_pair_tokens(assets)

    def encode(self, requests: Sequence[Any]) -> Tensors:
        refuse_no_requests(requests)
        dialogues = [read_dialogue(request, self.strategies, f"request {i}") for i, request in enumerate(requests)]
        for i, dialogue in enumerate(dialogues):
            if dialogue.edges is not None:
                raise InputError(f"request {i}: expected a dialogue without edges, found {len(dialogue.edges)} of them")
        return pair_tensors([dialogue.newest(self.config["max_turns"]) for dialogue in dialogues], self.tokens)

    def decode(self, outputs: Mapping[str, np.ndarray]) -> list[Any]:
        scores = outputs["pair_scores"]
        require_finite({"pair_scores": scores})
        return [{"edges": edges.tolist()} for edges in best_trees(scores)]

    def schema(self) -> Schema:
        return dialogue_schema(self.strategies)

    def example(self) -> Any:
        return {"turns": EXAMPLE["turns"]}

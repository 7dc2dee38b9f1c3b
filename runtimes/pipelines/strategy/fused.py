"""Next strategy of a supporter: a dialogue as text in, the strategy, emotions and attention out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.pipeline import Pipeline, Schema, refuse_no_requests
from runtimes.pipelines.strategy.cached import StrategyCascade
from runtimes.pipelines.strategy.dialogue import (
    EXAMPLE,
    STRATEGIES,
    Dialogue,
    dialogue_schema,
    emotion_tensors,
    graph_tensors,
    read_answers,
    read_dialogue,
)
from runtimes.pipelines.strategy.discourse import load_pair_tokens, pair_tensors
from runtimes.tensors import Tensors
from runtimes.text_pipeline import Tokens


class StrategyPipeline(Pipeline):
    """A request is a dialogue as `example` shows; a turn's `strategy`, `edges` and `emotion_logits` may be left out.

    Without edges the parser computes them, if the model was trained with one; else there are none.

    An answer is `{label, probs, emotions, attention}`: the likeliest strategy, the probability of each, and for every
    turn that was read, oldest first, its emotions and its share of the last layer's attention.
    """

    cascade = StrategyCascade

    def __init__(self, config: Mapping[str, Any], assets: Path) -> None:
        super().__init__(config, assets)
        self.strategies = STRATEGIES[config["labels"]]
        self.context_tokens = Tokens.load(assets / "context_tokenizer.json", config["max_tokens"])
        self.turn_tokens = Tokens.load(assets / "emotion_tokenizer.json", config["turn_tokens"])
        self.pair_tokens = load_pair_tokens(assets) if config["parser"] == "sddp" else None

    def encode(self, requests: Sequence[Any]) -> Tensors:
        """The tensors of the fused model; dialogues of different lengths are padded."""
        refuse_no_requests(requests)
        dialogues = [
            read_dialogue(request, self.strategies, f"request {i}").newest(self.config["max_turns"])
            for i, request in enumerate(requests)
        ]
        return {
            "context_ids": self.context_tokens.ids([dialogue.context for dialogue in dialogues]),
            "turn_ids": self._turn_ids(dialogues),
            **emotion_tensors(dialogues),
            **graph_tensors(dialogues, len(self.strategies)),
            **(self._unparsed(dialogues, self.pair_tokens) if self.pair_tokens else {}),
        }

    def _unparsed(self, dialogues: Sequence[Dialogue], tokens: Tokens) -> Tensors:
        """The inputs of the parser, and int64 [batch]: 1 for a dialogue with given edges, which it does not read."""
        known = [dialogue.edges is not None for dialogue in dialogues]
        return {**pair_tensors(dialogues, tokens), "edges_known": np.array(known, np.int64)}

    def _turn_ids(self, dialogues: Sequence[Dialogue]) -> np.ndarray:
        """int64 [batch, turns, tokens]; a turn whose emotion is given is not read again."""
        texts = [
            turn.text if dialogue.emotion_logits is None else "" for dialogue in dialogues for turn in dialogue.turns
        ]
        ids = self.turn_tokens.ids(texts)
        longest = max(len(dialogue.turns) for dialogue in dialogues)
        result = np.full((len(dialogues), longest, ids.shape[1]), self.turn_tokens.pad, np.int64)
        start = 0
        for row, dialogue in zip(result, dialogues, strict=True):
            row[: len(dialogue.turns)] = ids[start : start + len(dialogue.turns)]
            start += len(dialogue.turns)
        return result

    def decode(self, outputs: Mapping[str, np.ndarray]) -> list[Any]:
        return read_answers(outputs, self.strategies)

    def schema(self) -> Schema:
        return dialogue_schema(self.strategies)

    def example(self) -> Any:
        return EXAMPLE

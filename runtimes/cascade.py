"""The parts of a model in a row with a store between them: a frozen part runs only on texts that are new."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.artifact import ASSETS, artifact_name, read_json
from runtimes.base import Runtime, open_runtime
from runtimes.caching import Shelf, Store
from runtimes.dialogue import STRATEGIES, Dialogue, emotion_tensors, graph_tensors, read_answers, read_dialogue
from runtimes.errors import InputError
from runtimes.repository import find
from runtimes.tensors import BATCH, Tensors
from runtimes.texts import Tokens

SHELVES = "shelves.json"  # among the assets: what names the frozen parts in a store


class Reader:
    """A frozen part with its shelf: texts in, an array for each out."""

    def __init__(self, runtime: Runtime, tokens: Tokens, shelf: Shelf) -> None:
        self.runtime, self.tokens, self.shelf = runtime, tokens, shelf

    def read(self, texts: Sequence[str]) -> list[np.ndarray]:
        """From the shelf where it is there, else from the model, and then kept."""
        return self.shelf.complete(texts, self._ask)

    def _ask(self, texts: Sequence[str]) -> list[np.ndarray]:
        most = self.runtime.signature.axis(BATCH).max
        result: list[np.ndarray] = []
        for start in range(0, len(texts), most):
            (vectors,) = self.runtime.run({"token_ids": self.tokens.ids(texts[start : start + most])}).values()
            result += list(vectors)
        return result


class StrategyCascade:
    """Answers the requests of `strategy` by strategy_graph, with what the frozen parts said taken from a store.

    A context manager. `ArtifactError` if the store holds what other models said.
    """

    def __init__(self, repository: Path, store: Store, *, target: str = "onnx", precision: str = "fp32") -> None:
        self._stack = ExitStack()
        self._open: Callable[[str], Runtime] = lambda part: self._stack.enter_context(
            open_runtime(find(repository, artifact_name(f"strategy_{part}", target, precision)))
        )
        self.store = store

    def __enter__(self) -> "StrategyCascade":
        with ExitStack() as undo:
            undo.callback(self._stack.close)
            self.graph = self._open("graph")
            self.config = self.graph.artifact.config
            self.strategies = STRATEGIES[self.config["labels"]]
            self.contexts = self._reader("encoder", "context", "max_tokens")
            self.emotions = self._reader("emotion", "emotion", "turn_tokens")
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def answer(self, requests: Sequence[Any]) -> list[Any]:
        """One answer per request, as the pipeline of `strategy` gives it."""
        return read_answers(self.graph.run(self.feeds(requests)), self.strategies)

    def feeds(self, requests: Sequence[Any]) -> Tensors:
        """The tensors of strategy_graph; what is not in the store yet is read by the frozen parts."""
        if not requests:
            raise InputError("expected at least one request, found none")
        dialogues = [
            self._with_emotions(read_dialogue(request, self.strategies, f"request {i}"))
            for i, request in enumerate(requests)
        ]
        contexts = self.contexts.read([dialogue.context for dialogue in dialogues])
        return {
            "context": np.stack(contexts),
            "emotion_logits": emotion_tensors(dialogues)["emotion_logits"],
            **graph_tensors(dialogues, len(self.strategies)),
        }

    def _with_emotions(self, dialogue: Dialogue) -> Dialogue:
        newest = dialogue.newest(self.config["max_turns"])
        if newest.emotion_logits is not None:
            return newest
        logits = np.stack(self.emotions.read([turn.text for turn in newest.turns]))
        return Dialogue(turns=newest.turns, edges=newest.edges, emotion_logits=logits)

    def _reader(self, part: str, shelf: str, max_tokens: str) -> Reader:
        runtime = self._open(part)
        assets = runtime.root / ASSETS
        identity = {**read_json(assets / SHELVES)[shelf], "precision": runtime.artifact.precision}
        tokens = Tokens.load(assets / f"{shelf}_tokenizer.json", self.config[max_tokens])
        return Reader(runtime, tokens, self.store.shelf(shelf, identity))

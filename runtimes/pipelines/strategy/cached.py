"""The parts of a model with a store between them: a frozen part runs only on new texts."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.artifact import ASSETS, read_json
from runtimes.cache.store import Namespace, Store
from runtimes.pipeline import refuse_no_requests
from runtimes.pipelines.strategy.dialogue import (
    STRATEGIES,
    Dialogue,
    emotion_tensors,
    graph_tensors,
    read_answers,
    read_dialogue,
)
from runtimes.pipelines.strategy.discourse import (
    best_trees,
    load_pair_tokens,
    pair_tensors,
    parser_dialogue,
    parser_text,
)
from runtimes.repository import find_artifact
from runtimes.runtime import Runtime, open_runtime
from runtimes.tensors import BATCH, Tensors
from runtimes.text_pipeline import Tokens

NAMESPACES = "shelves.json"  # asset with the identities of the frozen parts in a store


class Reader:
    """A frozen part with its namespace in the store: texts in, an array for each out."""

    def __init__(
        self,
        runtime: Runtime,
        namespace: Namespace,
        encode: Callable[[Sequence[str]], Tensors],
        decode: Callable[[np.ndarray], Sequence[np.ndarray]] = list,
    ) -> None:
        self.runtime, self.namespace, self.encode, self.decode = runtime, namespace, encode, decode

    def read(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Stored outputs, and outputs of the model for the other texts, which are then stored."""
        return self.namespace.complete(texts, self._compute)

    def _compute(self, texts: Sequence[str]) -> list[np.ndarray]:
        most = self.runtime.signature.axis(BATCH).max
        result: list[np.ndarray] = []
        for start in range(0, len(texts), most):
            (vectors,) = self.runtime.run(self.encode(texts[start : start + most])).values()
            result += self.decode(vectors)
        return result


class StrategyCascade:
    """Answers the requests of `strategy` by strategy_graph, with the outputs of the frozen parts from a store.

    A context manager. `ArtifactError` if the store holds outputs of other models.
    """

    def __init__(
        self, repository: Path, store: Store, *, target: str = "onnx", precision: str = "fp32", device: str = "cpu"
    ) -> None:
        self._stack = ExitStack()
        self._open: Callable[[str], Runtime] = lambda part: self._stack.enter_context(
            open_runtime(find_artifact(repository, f"strategy_{part}", target, precision), device=device)
        )
        self.store = store

    def __enter__(self) -> "StrategyCascade":
        with ExitStack() as undo:
            undo.callback(self._stack.close)
            self.graph = self._open("graph")
            self.config = self.graph.artifact.config
            self.strategies = STRATEGIES[self.config["labels"]]
            self.contexts = self._text_reader("encoder", "context", "max_tokens")
            self.emotions = self._text_reader("emotion", "emotion", "turn_tokens")
            self.discourse = self._parser() if self.config["parser"] == "sddp" else None
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def answer(self, requests: Sequence[Any]) -> list[Any]:
        """One answer per request, as the pipeline of `strategy` gives it."""
        return read_answers(self.graph.run(self.inputs(requests)), self.strategies)

    def inputs(self, requests: Sequence[Any]) -> Tensors:
        """The tensors of strategy_graph; the frozen parts run on texts that are not stored yet."""
        refuse_no_requests(requests)
        dialogues = [
            self._complete(read_dialogue(request, self.strategies, f"request {i}").newest(self.config["max_turns"]))
            for i, request in enumerate(requests)
        ]
        contexts = self.contexts.read([dialogue.context for dialogue in dialogues])
        return {
            "context": np.stack(contexts),
            "emotion_logits": emotion_tensors(dialogues)["emotion_logits"],
            **graph_tensors(dialogues, len(self.strategies)),
        }

    def _complete(self, dialogue: Dialogue) -> Dialogue:
        """The dialogue with emotions, and with edges if the model was trained with a parser."""
        if dialogue.emotion_logits is None:
            dialogue = dialogue.with_emotions(self.emotions.read([turn.text for turn in dialogue.turns]))
        if dialogue.edges is None and self.discourse:
            dialogue = dialogue.with_edges(self.discourse.read([parser_text(dialogue)])[0])
        return dialogue

    def _text_reader(self, part: str, namespace: str, max_tokens: str) -> Reader:
        runtime = self._open(part)
        tokens = Tokens.load(runtime.root / ASSETS / f"{namespace}_tokenizer.json", self.config[max_tokens])
        return Reader(runtime, self._namespace(runtime, namespace), lambda texts: {"token_ids": tokens.ids(texts)})

    def _parser(self) -> Reader:
        runtime = self._open("parser")
        tokens = load_pair_tokens(runtime.root / ASSETS)

        def encode(texts: Sequence[str]) -> Tensors:
            return pair_tensors([parser_dialogue(text) for text in texts], tokens)

        return Reader(runtime, self._namespace(runtime, "discourse"), encode, best_trees)

    def _namespace(self, runtime: Runtime, name: str) -> Namespace:
        identity = read_json(runtime.root / ASSETS / NAMESPACES)[name]
        return self.store.namespace(name, {**identity, "precision": runtime.artifact.precision})

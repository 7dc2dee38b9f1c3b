"""Answers by content: a request that an artifact has answered before is answered without running it."""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from runtimes.artifact import Artifact
from runtimes.cache.store import Store
from runtimes.pipeline import open_pipeline
from runtimes.repository import find_artifact
from runtimes.runtime import Runtime, open_runtime

WRITE = json.JSONEncoder(sort_keys=True).encode  # json.dumps makes an encoder at every call


class AnswerCache:
    """The artifact of `model` behind a store. A context manager; the first request that is not stored opens it.

    The store's namespace has the artifact's key as its identity, hence checkpoint, precision and library versions.
    """

    model: ClassVar[str]

    def __init__(
        self, repository: Path, store: Store, *, target: str = "onnx", precision: str = "fp32", device: str = "cpu"
    ) -> None:
        root = find_artifact(repository, self.model, target, precision)
        artifact = Artifact.load(root)
        self._stack = ExitStack()
        self._open: Callable[[], Runtime] = lambda: self._stack.enter_context(open_runtime(root, device=device))
        self._pipeline = open_pipeline(artifact, root)
        self._namespace = store.namespace(f"{artifact.name}_answers", {"artifact": artifact.key})

    def __enter__(self) -> "AnswerCache":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @cached_property
    def _runtime(self) -> Runtime:
        return self._open()

    def answer(self, requests: Sequence[Any]) -> list[Any]:
        """One answer per request; only requests that are not stored run."""
        texts = list(map(WRITE, requests))
        return [json.loads(str(entry.data, "utf-8")) for entry in self._namespace.complete(texts, self._compute)]

    def _compute(self, texts: Sequence[str]) -> list[np.ndarray]:
        result = []
        for text in texts:  # one at a time: an answer must not depend on the other requests of a batch
            inputs = self._pipeline.encode([json.loads(text)])
            (answer,) = self._pipeline.decode(self._runtime.fresh(inputs))
            result.append(np.frombuffer(json.dumps(answer).encode(), np.uint8))
        return result

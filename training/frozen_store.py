"""Outputs of frozen models, kept in a store by content: each text is read once, whatever is trained on it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtimes.cache.store import Store, buckets
from runtimes.host.progress import Progress

PADDED_SIZE = 4096  # tokens of a batch, padding included
EVERY_TEXT = slice(None)


@dataclass(frozen=True, kw_only=True, slots=True)
class FrozenInference:
    """The texts of the data for a frozen model.

    namespace  of the store
    identity   names the model, its tokenizer and its settings
    lengths    the length of each text in tokens
    run        the model's output for each text of a batch
    """

    namespace: str
    identity: Mapping[str, Any]
    texts: Sequence[str]
    lengths: Callable[[Sequence[str]], Sequence[int]]
    run: Callable[[Sequence[str]], Sequence[np.ndarray]]


def fill(store: Store, inference: FrozenInference, padded_size: int = PADDED_SIZE, share: slice = EVERY_TEXT) -> int:
    """The number of texts read: those of this share without an entry. Each batch is stored as soon as it is read."""
    namespace = store.namespace(inference.namespace, inference.identity)
    missing = namespace.missing(list(dict.fromkeys(inference.texts))[share])
    with Progress(inference.namespace, len(missing)) as bar:
        for batch in buckets(missing, inference.lengths(missing), padded_size):
            namespace.put(batch, inference.run(batch))
            bar.advance(len(batch))
    return len(missing)

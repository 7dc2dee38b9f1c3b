"""Training text: documents of UTF-8 bytes, and their pieces, of the size of a step.

Every piece is read after BOS, so that no state is kept between pieces and memory does not grow with a document.
No piece begins inside a code point.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from runtimes.errors import InputError
from runtimes.host.cli import existing_folder
from runtimes.pipelines.hnet.byte_text import BOS, decode_utf8
from training.models.hnet.arch import parse_numbers

UNITS = ("document", "line")
SPLIT_SEED, VALID_SHARE, TEST_SHARE = 42, 0.1, 0.1
IGNORED = -100  # torch's label of a position without a loss
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Documents as one array of bytes uint8 [N]; document i is `text[offsets[i]:offsets[i + 1]]`."""

    text: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, documents: Sequence[bytes]) -> "Corpus":
        offsets = np.cumsum([0, *map(len, documents)])
        return cls(text=np.frombuffer(b"".join(documents), np.uint8), offsets=offsets)

    @cached_property
    def code_point_starts(self) -> np.ndarray:
        """bool [N + 1]: where a code point begins, or the text ends."""
        return np.append((self.text & 0xC0) != 0x80, True)

    def pieces(self, max_bytes: int, phases: np.ndarray | None = None) -> np.ndarray:
        """int64 [pieces, 2]: begin and end of every piece, in order; none longer than `max_bytes` and three more.

        A document is cut every `max_bytes` from its phase on, and each cut moved back to where a code point begins.
        """
        lengths = np.diff(self.offsets)
        phases = np.zeros_like(lengths) if phases is None else phases % max_bytes
        cuts = [
            np.concatenate([[begin], np.arange(begin + (phase or max_bytes), begin + length, max_bytes)])
            for begin, length, phase in zip(self.offsets, lengths, phases, strict=False)
            if length
        ]
        begins = np.concatenate(cuts) if cuts else np.zeros(0, np.int64)
        starts = np.flatnonzero(self.code_point_starts)
        begins = np.unique(starts[np.searchsorted(starts, begins, "right") - 1])
        return np.stack([begins, np.append(begins[1:], len(self.text))], 1)


def read_corpora(folder: Path, unit: str) -> tuple[Corpus, Corpus, list[str]]:
    """Training and validation text of a folder, and lines about what was read.

    `train*.*` and `valid*.*` or `dev*.*` where these exist; else all `*.txt`, of whose texts 80 % train, 10 % are
    held out to validate and 10 % to test, drawn with seed 42. `InputError` for no UTF-8 and for too little text.
    """
    existing_folder(folder, "texts")
    if unit not in UNITS:
        raise InputError(f"expected unit of {', '.join(UNITS)}; found '{unit}'")
    train = _texts(_files(folder, "train*.*"), unit)
    valid = _texts(_files(folder, "valid*.*", "dev*.*"), unit)
    if not train and not valid:
        texts = _texts(_files(folder, "*.txt"), unit)
        order = np.random.default_rng(SPLIT_SEED).permutation(len(texts))
        held, tested = (max(1, round(share * len(texts))) for share in (VALID_SHARE, TEST_SHARE))
        if len(texts) > held + tested:
            valid = [texts[i] for i in order[:held]]
            train = [texts[i] for i in order[held + tested :]]
    if not train or not valid:
        raise InputError(
            f"expected train*.* and valid*.* (or dev*.*), or *.txt with 3 or more texts, in {folder}; "
            f"found {len(train)} texts to train on and {len(valid)} held out"
        )
    return Corpus.of(train), Corpus.of(valid), _summary(train, valid, unit)


def _files(folder: Path, *patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())


def _texts(files: Sequence[Path], unit: str) -> list[bytes]:
    """The texts of these files: separated by blank lines, or one a line; empty ones are left out."""
    texts = []
    for path in files:
        text = decode_utf8(path.read_bytes(), str(path))
        parts = text.split("\n\n") if unit == "document" else text.split("\n")
        texts += [part.strip("\n").encode() for part in parts if part.strip()]
    return texts


def _summary(train: Sequence[bytes], valid: Sequence[bytes], unit: str) -> list[str]:
    sizes = [f"{len(texts)} {unit}s ({sum(map(len, texts)):,} bytes)" for texts in (train, valid)]
    return [f"{sizes[0]} to train on, {sizes[1]} held out"]


SYLLABLES = [chr(consonant) + vowel for consonant in range(0x0C15, 0x0C25) for vowel in ("", "ా", "ి", "ు")]


def synthetic_corpora(seed: int, texts: int) -> tuple[Corpus, Corpus]:
    """Texts of words of a stem and one or two endings, as an agglutinative language has them; a tenth is held out."""
    if texts < 2:
        raise InputError(f"expected 2 or more synthetic texts, found {texts}")
    rng = np.random.default_rng(seed)
    stems = ["".join(rng.choice(SYLLABLES, 3)) for _ in range(60)]
    endings = ["".join(rng.choice(SYLLABLES, 2)) for _ in range(12)]

    def word() -> str:
        return str(rng.choice(stems)) + "".join(rng.choice(endings, rng.integers(1, 3)))

    documents = [" ".join(word() for _ in range(12)).encode() for _ in range(texts)]
    held_out = max(1, texts // 10)
    return Corpus.of(documents[held_out:]), Corpus.of(documents[:held_out])


def write_sample(folder: Path, seed: int) -> list[Path]:
    """Writes 400 synthetic texts to train.te and valid.te, with blank lines between them; the paths written."""
    paths = [folder / "train.te", folder / "valid.te"]
    for path, corpus in zip(paths, synthetic_corpora(seed, 400), strict=True):
        documents = [corpus.text[begin:end].tobytes() for begin, end in pairwise(corpus.offsets)]
        path.write_bytes(b"\n\n".join(documents) + b"\n")
    return paths


class Pieces(Dataset[Batch]):
    """Pieces of a corpus, cut elsewhere and in another order each time all of them have been shown.

    An epoch shows `epoch_bytes` of text, or all of it if that is 0; only full batches of `step_rows` pieces.
    """

    def __init__(self, corpus: Corpus, max_bytes: int, *, step_rows: int, seed: int, epoch_bytes: int = 0) -> None:
        if max_bytes < 4:
            raise InputError(f"expected max_bytes of 4 or more, the longest code point; found {max_bytes}")
        self.corpus, self.max_bytes, self.seed = corpus, max_bytes, seed
        count = len(corpus.pieces(max_bytes))
        wanted = -(-epoch_bytes // max_bytes) if epoch_bytes else count
        self.length = min(wanted, count) // step_rows * step_rows or min(wanted, count)
        self.epochs_a_pass = max(1, count // self.length)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        turn, place = divmod(epoch, self.epochs_a_pass)
        rng = np.random.default_rng((self.seed, turn))
        phases = rng.integers(0, self.max_bytes, len(self.corpus.offsets) - 1)
        pieces = self.corpus.pieces(self.max_bytes, phases if turn else None)
        order = rng.permutation(len(pieces))[place * self.length : (place + 1) * self.length]
        self.epoch, self.pieces = epoch, pieces[order]

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, places: Sequence[int]) -> Batch:
        return batch_of(self.corpus, self.pieces[list(places)], self.epoch)


def batch_of(corpus: Corpus, pieces: np.ndarray, epoch: int = 0) -> Batch:
    """Pieces as a batch: `byte_ids` int64 [B, T] from BOS on, `labels` the bytes that follow, IGNORED after the end."""
    lengths = pieces[:, 1] - pieces[:, 0]
    ids = np.zeros((len(pieces), int(lengths.max())), np.int64)
    labels = np.full_like(ids, IGNORED)
    for row, (begin, end) in enumerate(pieces):
        labels[row, : end - begin] = corpus.text[begin:end]
        ids[row, 1 : end - begin] = corpus.text[begin : end - 1]
    ids[:, 0] = BOS
    arrays = {"byte_ids": ids, "labels": labels, "lengths": lengths.astype(np.int64), "epoch": np.int64(epoch)}
    return {name: torch.as_tensor(array) for name, array in arrays.items()}


def pack(offsets: Sequence[int], byte_ids: Sequence[int] | np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """A ragged batch as `byte_ids` int64 [B, T] and `lengths` int64 [B], from rows laid end to end.

    Row i is `byte_ids[offsets[i]:offsets[i + 1]]` (flash-attn's cu_seqlens). `InputError` unless the rows fill it.
    """
    flat, lengths = np.asarray(byte_ids, np.int64), np.diff(offsets)
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(flat) or lengths.min() < 1:
        raise InputError(f"expected offsets that rise from 0 to {len(flat)}, found {list(offsets)[:8]}")
    rows = np.zeros((len(lengths), int(lengths.max())), np.int64)
    rows[np.arange(rows.shape[1]) < lengths[:, None]] = flat
    return torch.from_numpy(rows), torch.from_numpy(lengths.astype(np.int64))


def check_compression(n_compress: str, stages: int) -> list[int]:
    """Bytes a position at every stage, rising from 1; `InputError` unless there is one for each of them."""
    numbers = parse_numbers("n_compress", n_compress)
    if len(numbers) != stages + 1 or numbers[0] != 1 or any(a >= b for a, b in pairwise(numbers)):
        raise InputError(
            f"n_compress: expected {stages + 1} numbers that rise from 1, such as "
            f"'{' '.join(str(4 * i or 1) for i in range(stages + 1))}', found '{n_compress}'"
        )
    return numbers

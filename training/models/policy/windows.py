"""Overlapping windows of games, cut from one resident table when a batch is made and never before.

380,000 frames are 436 MB; their windows of 30 frames would be 13 GB. A window is W consecutive rows, so a view of the
table with overlapping rows of W * D numbers holds every window at no cost, and one indexing makes a batch.

Shapes: F rows of the table, D = 287 columns, N windows, W frames a window, B windows a batch.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from runtimes.errors import InputError, require
from runtimes.pipelines.policy.melee import FRAME_WIDTH, LABEL_WIDTH
from training.models.policy.data import Game

Batch = dict[str, torch.Tensor]
Mode = Literal["lazy", "eager", "auto"]

CGROUP = Path("/sys/fs/cgroup")
CGROUP_FILES = (  # limit and use: version 2, version 1
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
SERIAL = 32_767  # numbers; torch 2.13 splits an elementwise operation on more among threads
EAGER_SHARE = 0.5  # of the memory available, which the windows may take in mode auto


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FrameTable:
    """All games one after the other: frames [F, 287], labels uint8 [F, 6]; game g is rows bounds[g] to bounds[g + 1].

    In float16 a table takes half the memory; the id columns stay exact.
    """

    frames: np.ndarray
    labels: np.ndarray
    bounds: np.ndarray

    @classmethod
    def from_games(cls, games: list[Game], dtype: torch.dtype = torch.float32) -> "FrameTable":
        """The table of `games`, which is left empty: a game is released once copied, and never in memory twice."""
        if not games:
            raise InputError("expected at least one game, found none")
        bounds = np.cumsum([0, *(len(game.frames) for game in games)])
        frames_FD = torch.empty((int(bounds[-1]), FRAME_WIDTH), dtype=dtype).numpy()
        labels = np.empty((bounds[-1], LABEL_WIDTH), np.uint8)
        for index in reversed(range(len(games))):
            rows, game = slice(bounds[index], bounds[index + 1]), games.pop()
            frames_FD[rows], labels[rows] = game.frames, game.labels
        return cls(frames=frames_FD, labels=labels, bounds=bounds)

    @property
    def nbytes(self) -> int:
        return self.frames.nbytes + self.labels.nbytes


class Windows:
    """The windows of a table, none across two games; `batch` returns any of them by index.

    `lazy` cuts a batch from the table; `eager` keeps a copy of every window, the same bit for bit; `auto` is eager if
    the copy fits in half of the memory available. `mode` then has the choice.
    """

    def __init__(self, table: FrameTable, length: int, *, stride: int = 1, mode: Mode = "lazy") -> None:
        if length < 1 or stride < 1:
            raise InputError(f"expected a window and a stride of 1 or more frames, found {length} and {stride}")
        sizes = np.diff(table.bounds)
        counts = np.maximum(0, (sizes - length) // stride + 1)
        if not counts.any():
            raise InputError(f"expected a game of at least {length} frames, found none longer than {sizes.max()}")
        self.table, self.length, self.stride = table, length, stride
        self._ends = np.cumsum(counts)  # of each game, in windows
        self._begins = self._ends - counts
        self._rooms = (sizes - length) % stride + 1
        self.offset = 0
        self.mode: Literal["lazy", "eager"] = _choose(mode, self.nbytes)
        self._frames, self._labels = self._sources()

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def nbytes(self) -> int:
        """The size of a copy of every window."""
        row_bytes = self.table.nbytes // len(self.table.frames)
        return len(self) * self.length * row_bytes

    def shift(self, offset: int) -> None:
        """Move the windows of each game `offset` rows on, modulo the rows that the last one leaves over plus one.

        So the number of windows is the same for every offset, and none leaves its game.
        """
        self.offset = offset
        if self.mode == "eager":
            self._frames, self._labels = self._sources()

    def starts(self, windows: np.ndarray) -> np.ndarray:
        """The first rows [B] of windows [B]: a formula over the games, so that a window costs no memory at all."""
        game = np.searchsorted(self._ends, windows, side="right")
        return self.table.bounds[game] + (windows - self._begins[game]) * self.stride + self.offset % self._rooms[game]

    def is_first(self, windows: np.ndarray) -> np.ndarray:
        """bool [B]: which of these windows is the first of its game."""
        return windows == self._begins[np.searchsorted(self._ends, windows, side="right")]

    def batch(self, windows: np.ndarray) -> Batch:
        """frames float32 [B, W, 287] and labels uint8 [B, W, 6] of the windows with these indices [B]."""
        # NumPy and not torch.index_select, which is twice as fast on two idle cores but waits 10 ms for a busy one, and
        # the cores are busy while a model trains. Not np.take either: it first copies the view, all of it.
        rows = windows if self.mode == "eager" else self.starts(windows)
        frames = _gather(self._frames, rows).view(-1, self.length, FRAME_WIDTH)
        labels = torch.from_numpy(self._labels[rows]).view(-1, self.length, LABEL_WIDTH)
        return {"frames": frames, "labels": labels}

    def _sources(self) -> tuple[np.ndarray, np.ndarray]:
        views = self._overlapping(self.table.frames), self._overlapping(self.table.labels)
        if self.mode == "lazy":
            return views
        self._frames = self._labels = np.empty(0)  # the copy of an earlier shift, released before the next
        rows = self.starts(np.arange(len(self)))
        return views[0][rows], views[1][rows]

    def _overlapping(self, table: np.ndarray) -> np.ndarray:
        """[F - W + 1, W * D]: row i is the window that starts at row i. A view, without memory of its own."""
        rows, width = table.shape
        shape, strides = (rows - self.length + 1, self.length * width), (table.strides[0], table.itemsize)
        return np.lib.stride_tricks.as_strided(table, shape, strides, writeable=False)


class Permutation:
    """A bijection of range(n) that costs no memory: a keyed Feistel network over the next power of two.

    Four rounds: Luby and Rackoff 1988; results outside range(n) are mapped again (Black and Rogaway 2002).
    """

    ROUNDS = 4

    def __init__(self, n: int, *key: int) -> None:
        if n < 1:
            raise InputError(f"expected something to permute, found {n} items")
        self.n = n
        bits = max(n - 1, 1).bit_length()
        self._low_bits = np.uint64((bits + 1) // 2)
        self._masks = [(np.uint64(1) << width) - np.uint64(1) for width in (self._low_bits, np.uint64(bits // 2))]
        self._keys = np.random.SeedSequence(key).generate_state(self.ROUNDS, np.uint64)

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """The images int64 [...] of indices [...] in range(n)."""
        images = self._round_trip(np.asarray(indices).astype(np.uint64))
        while (outside := images >= self.n).any():
            images[outside] = self._round_trip(images[outside])
        return images.astype(np.int64)

    def _round_trip(self, values: np.ndarray) -> np.ndarray:
        halves = [values & self._masks[0], values >> self._low_bits]
        for turn, key in enumerate(self._keys):
            target = turn % 2
            halves[target] = halves[target] ^ (_mixed(halves[1 - target] + key) & self._masks[target])
        return halves[1] << self._low_bits | halves[0]


class WindowDataset(Dataset[Batch]):
    """Windows in training order, as a map-style dataset to be read in sequence: the order is in the index.

    Sample i of an epoch: batches are `step_rows` wide (batch size times world size) and step t takes the window
    t % carry of the segments permutation[t // carry * step_rows + step_row]; a segment is `carry` consecutive windows.
    So a row of successive batches continues in the same game, and `carried` bool [B] is true where the state of the row
    before is valid, and false where a segment or a game begins. The last segment ends with the last window; the last
    batches are filled with segments from the front. `carry=1` is independent windows in shuffled order.
    """

    def __init__(
        self,
        windows: Windows,
        *,
        carry: int = 1,
        step_rows: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        shift: bool = False,
    ) -> None:
        if carry < 1 or step_rows < 1:
            raise InputError(f"expected a carry and rows of 1 or more, found {carry} and {step_rows}")
        if carry > 1 and windows.stride != windows.length:
            raise InputError(f"expected a stride of {windows.length} to carry state over, found {windows.stride}")
        if carry > len(windows):
            raise InputError(f"expected {carry} or more windows to carry state over, found {len(windows)}")
        self.windows, self.carry, self.seed, self.shuffle, self.shifts = windows, carry, seed, shuffle, shift
        self.step_rows = (
            step_rows if carry > 1 else 1
        )  # independent windows need no rows of a step, so none is repeated
        self.segments = -(-len(windows) // carry)
        self.set_epoch(0)

    def __len__(self) -> int:
        return -(-self.segments // self.step_rows) * self.step_rows * self.carry

    def set_epoch(self, epoch: int) -> None:
        """Another order, and with `shift` other window boundaries; the same for the same seed and epoch."""
        self.order = Permutation(self.segments, self.seed, epoch)
        if self.shifts:
            self.windows.shift(int(np.random.default_rng([self.seed, epoch]).integers(self.windows.length)))

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The window int64 [B] and `carried` bool [B] of each sample of this epoch: a formula, so any order resumes."""
        steps, step_row = np.divmod(samples, self.step_rows)
        block, within = np.divmod(steps, self.carry)
        segment = (block * self.step_rows + step_row) % self.segments
        if self.shuffle:
            segment = self.order(segment)
        window = np.minimum(segment * self.carry, len(self.windows) - self.carry) + within
        return window, (within > 0) & ~self.windows.is_first(window)

    def __getitems__(self, samples: Sequence[int]) -> Batch:
        """One batch; already collated, so the loader's collate function must return it as it is."""
        window, carried = self.locate(np.asarray(samples, np.int64))
        return {**self.windows.batch(window), "carried": torch.from_numpy(carried)}

    def __getitem__(self, sample: int) -> Batch:
        if not 0 <= sample < len(self):
            raise IndexError(f"expected a sample in 0..{len(self) - 1}, found {sample}")
        return {name: tensor[0] for name, tensor in self.__getitems__([sample]).items()}


def batches(dataset: WindowDataset, size: int, *, first: int = 0, ahead: int = 2) -> Iterator[Batch]:
    """The samples from `first` on in batches of `size`, `ahead` of them made in the background.

    The thread ends with the iterator: at its end, when it is closed, and when making a batch fails, which is raised
    here.
    """
    spans = (range(i, min(i + size, len(dataset))) for i in range(first, len(dataset), size))
    maker = ThreadPoolExecutor(1, thread_name_prefix="window-batches")
    try:
        pending = deque(maker.submit(dataset.__getitems__, span) for span in islice(spans, ahead))
        while pending:
            batch = pending.popleft().result()
            pending.extend(maker.submit(dataset.__getitems__, span) for span in islice(spans, 1))
            yield batch
    finally:
        maker.shutdown(cancel_futures=True)


def available_bytes(cgroup: Path = CGROUP) -> int:
    """Memory that can still be taken: the system's, or less where a control group sets a limit."""
    available = int(require("psutil", extra="train").virtual_memory().available)
    for limit, used in CGROUP_FILES:
        if (cgroup / limit).is_file() and (text := (cgroup / limit).read_text().strip()).isdigit():
            available = min(available, int(text) - int((cgroup / used).read_text()))
    return max(available, 0)


def _choose(mode: Mode, window_bytes: int) -> Literal["lazy", "eager"]:
    if mode not in ("lazy", "eager", "auto"):
        raise InputError(f"expected mode lazy, eager or auto, found '{mode}'")
    if mode == "auto":
        return "eager" if window_bytes <= EAGER_SHARE * available_bytes() else "lazy"
    return mode


def _gather(source: np.ndarray, rows: np.ndarray) -> torch.Tensor:
    """float32 [B, W * D]: the given rows of the source."""
    cut = torch.from_numpy(source[rows])
    if cut.dtype == torch.float32:
        return cut
    # Memory from NumPy: glibc releases that of torch.empty late, and ten batches stay resident.
    result = torch.from_numpy(np.empty(cut.shape, np.float32))
    for to, piece in zip(result.view(-1).split(SERIAL), cut.view(-1).split(SERIAL), strict=True):
        to.copy_(piece)
    return result


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014); products wrap at 64 bits."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)

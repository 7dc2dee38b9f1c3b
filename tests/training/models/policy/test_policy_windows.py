"""Windows against a plain loop over games, and the documented order of training."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from runtimes.errors import InputError
from runtimes.pipelines.policy.melee import FRAME_WIDTH, ID_COLUMNS, LABEL_WIDTH
from tests.toys import wait_for
from training.models.policy import windows as module
from training.models.policy.data import Game, synthetic_games
from training.models.policy.windows import (
    FrameTable,
    Permutation,
    WindowDataset,
    Windows,
    available_bytes,
    batches,
)

SIZES = (50, 7, 8, 3, 31, 64)


def numbered_games(sizes: tuple[int, ...] = SIZES) -> list[Game]:
    """Games whose every row has the numbers of its game and row, in the frames and in the labels."""
    games = []
    for game, size in enumerate(sizes):
        frames = np.random.default_rng(game).random((size, FRAME_WIDTH), np.float32)
        frames[:, 0], frames[:, 1] = game, np.arange(size)
        labels = np.full((size, LABEL_WIDTH), game, np.uint8)
        labels[:, 1] = np.arange(size)
        games.append(Game(name=str(game), group=str(game), frames=frames, labels=labels))
    return games


def numbered_windows(length: int, stride: int, **options: Any) -> Windows:
    return Windows(FrameTable.from_games(numbered_games()), length, stride=stride, **options)


@pytest.mark.parametrize("stride", [1, 3, 8])
@pytest.mark.parametrize("mode", ["lazy", "eager"])
def test_windows_are_those_of_a_plain_loop(mode: Any, stride: int) -> None:
    want_frames, want_labels = [], []
    for game in numbered_games():
        for start in range(0, len(game.frames) - 8 + 1, stride):
            want_frames.append(game.frames[start : start + 8])
            want_labels.append(game.labels[start : start + 8])
    windows = numbered_windows(8, stride, mode=mode)
    assert len(windows) == len(want_frames)
    order = np.random.default_rng(0).permutation(len(windows))
    batch = windows.batch(order)
    np.testing.assert_array_equal(batch["frames"], np.stack(want_frames)[order])
    np.testing.assert_array_equal(batch["labels"], np.stack(want_labels)[order])
    assert batch["frames"].dtype == torch.float32
    assert batch["labels"].dtype == torch.uint8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_lazy_is_eager_bit_for_bit(dtype: torch.dtype) -> None:
    table = FrameTable.from_games(synthetic_games(0, 5, 100), dtype)
    lazy, eager = Windows(table, 30, mode="lazy"), Windows(table, 30, mode="eager")
    everything = np.arange(len(lazy))
    for offset in (0, 17):
        lazy.shift(offset)
        eager.shift(offset)
        for name, tensor in lazy.batch(everything).items():
            assert torch.equal(tensor, eager.batch(everything)[name])


@pytest.mark.parametrize("offset", [0, 1, 5, 7, 100])
@pytest.mark.parametrize("stride", [1, 8])
def test_no_window_crosses_a_game(offset: int, stride: int) -> None:
    windows = numbered_windows(8, stride)
    count = len(windows)
    windows.shift(offset)
    frames = windows.batch(np.arange(count))["frames"]
    assert (frames[:, :, 0] == frames[:, :1, 0]).all()
    assert (frames[:, 1:, 1] - frames[:, :-1, 1] == 1).all()
    assert set(frames[:, 0, 0].int().tolist()) == {0, 2, 4, 5}  # every game that is long enough


def test_an_offset_moves_the_windows_but_not_their_number() -> None:
    windows = numbered_windows(8, 8)
    everything = np.arange(len(windows))
    starts = windows.starts(everything)
    windows.shift(4)
    assert len(windows) == len(starts)
    assert set(windows.starts(everything) - starts) == {0, 1, 4}  # 4 modulo rooms of 3, 1, 8 and 1 rows
    windows.shift(0)
    np.testing.assert_array_equal(windows.starts(everything), starts)


@pytest.mark.parametrize(("rows", "length", "count"), [(380_000, 30, 379_971), (30, 30, 1), (31, 30, 2)])
def test_one_game_of_f_rows_has_f_minus_w_plus_1_windows(rows: int, length: int, count: int) -> None:
    table = FrameTable(
        frames=np.empty((rows, FRAME_WIDTH), np.float16),
        labels=np.empty((rows, LABEL_WIDTH), np.uint8),
        bounds=np.array([0, rows]),
    )
    assert len(Windows(table, length)) == count


def test_windows_longer_than_every_game_are_refused() -> None:
    with pytest.raises(InputError, match="at least 65 frames, found none longer than 64"):
        numbered_windows(65, 1)
    with pytest.raises(InputError):
        numbered_windows(0, 1)
    with pytest.raises(InputError, match="found 'lazier'"):
        numbered_windows(8, 1, mode="lazier")


def test_a_table_takes_its_games_out_of_the_list() -> None:
    games = numbered_games()
    want = np.concatenate([game.frames for game in games])
    table = FrameTable.from_games(games)
    assert games == []
    np.testing.assert_array_equal(table.frames, want)
    assert table.nbytes == sum(SIZES) * (287 * 4 + 6)
    with pytest.raises(InputError):
        FrameTable.from_games([])


def test_ids_are_exact_in_a_half_precision_table() -> None:
    games = synthetic_games(0, 1, 100)
    want = games[0].frames.copy()
    frames = FrameTable.from_games(games, torch.float16).frames.astype(np.float32)
    np.testing.assert_array_equal(frames[:, ID_COLUMNS:], want[:, ID_COLUMNS:])
    np.testing.assert_allclose(frames, want, rtol=1e-3, atol=1e-6)


def test_auto_is_eager_only_where_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    need = numbered_windows(8, 1).nbytes
    assert need == len(numbered_windows(8, 1)) * 8 * (287 * 4 + 6)
    for available, want in ((2 * need, "eager"), (2 * need - 1, "lazy")):
        monkeypatch.setattr(module, "available_bytes", lambda available=available: available)
        assert numbered_windows(8, 1, mode="auto").mode == want


def test_a_control_group_limits_the_memory_available(tmp_path: Path) -> None:
    free = available_bytes(tmp_path)
    assert free > 10**7
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert available_bytes(tmp_path) == 2_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(tmp_path) > 10**7
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text("5")
    (tmp_path / "memory/memory.usage_in_bytes").write_text("9")
    assert available_bytes(tmp_path) == 0


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 31, 64, 97, 1000, 1024, 1025, 7919, 65537])
def test_a_permutation_is_a_bijection(n: int) -> None:
    for key in ((0, 0), (0, 1), (7, 3)):
        images = Permutation(n, *key)(np.arange(n))
        np.testing.assert_array_equal(np.sort(images), np.arange(n))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 3000), st.integers(0, 2**63))
def test_a_permutation_is_a_bijection_for_any_size_and_key(n: int, key: int) -> None:
    assert len(np.unique(Permutation(n, key)(np.arange(n)))) == n


def test_a_permutation_looks_shuffled() -> None:
    n = 20_000
    images = Permutation(n, 0, 0)(np.arange(n))
    assert abs(np.corrcoef(np.arange(n), images)[0, 1]) < 0.03
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.03
    assert (np.abs(np.diff(images)) == 1).sum() < 10
    assert (images == np.arange(n)).sum() < 10
    low, high = np.histogram(images[: n // 10], bins=10, range=(0, n))[0][[0, -1]]
    assert 120 < low < 280
    assert 120 < high < 280


def test_an_epoch_and_a_seed_each_change_the_order() -> None:
    dataset = WindowDataset(numbered_windows(8, 1), seed=1)
    orders = []
    for seed, epoch in ((1, 0), (1, 1), (2, 0), (1, 0)):
        dataset.seed = seed
        dataset.set_epoch(epoch)
        orders.append(dataset.locate(np.arange(len(dataset)))[0].tolist())
    assert orders[0] == orders[3]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert all(sorted(order) == list(range(len(dataset))) for order in orders)


def test_without_shuffling_windows_come_in_order() -> None:
    dataset = WindowDataset(numbered_windows(8, 1), shuffle=False)
    window, carried = dataset.locate(np.arange(len(dataset)))
    np.testing.assert_array_equal(window, np.arange(len(dataset)))
    assert not carried.any()


@pytest.mark.parametrize(("carry", "step_rows"), [(1, 4), (2, 1), (3, 4), (4, 3), (15, 2)])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_carried_state_belongs_to_the_rows_just_before(carry: int, step_rows: int, epoch: int) -> None:
    dataset = WindowDataset(numbered_windows(8, 8), carry=carry, step_rows=step_rows, shift=True, seed=5)
    dataset.set_epoch(epoch)
    seen, carries, ends = set(), 0, [None] * step_rows
    for batch in batches(dataset, step_rows):
        first, last = batch["frames"][:, 0, :2].int().tolist(), batch["frames"][:, -1, :2].int().tolist()
        for step_row, carried in enumerate(batch["carried"].tolist()):
            game, row = first[step_row]
            seen.add((game, row))
            if carried:
                assert ends[step_row] == [game, row - 1]
                carries += 1
            ends[step_row] = last[step_row]
    assert len(seen) == len(dataset.windows)  # every window is seen
    assert (carries > 0) == (carry > 1)


def test_state_is_dropped_only_where_a_segment_or_a_game_begins() -> None:
    windows = numbered_windows(8, 8)  # 6, 1, 3 and 8 windows of four games
    dataset = WindowDataset(windows, carry=9, step_rows=2, shuffle=False)
    window, carried = dataset.locate(np.arange(len(dataset)).reshape(9, 2).T.ravel())
    np.testing.assert_array_equal(window, np.arange(18))
    assert np.flatnonzero(~carried).tolist() == [0, 6, 7, 9, 10]


def test_the_last_segment_ends_with_the_last_window_and_the_last_batch_is_full() -> None:
    dataset = WindowDataset(numbered_windows(8, 8), carry=4, step_rows=3)
    assert (dataset.segments, len(dataset)) == (5, 24)
    window, _ = dataset.locate(np.arange(24))
    assert set(window) == set(range(18))
    with pytest.raises(InputError, match="stride of 8"):
        WindowDataset(numbered_windows(8, 1), carry=2)
    with pytest.raises(InputError, match="found 18"):
        WindowDataset(numbered_windows(8, 8), carry=19)


def test_any_samples_in_any_order_are_those_of_the_whole_epoch() -> None:
    dataset = WindowDataset(numbered_windows(8, 8), carry=3, step_rows=2, seed=3)
    whole = dataset.__getitems__(range(len(dataset)))
    some = [17, 3, 3, 0, 11]
    for name, tensor in dataset.__getitems__(some).items():
        assert torch.equal(tensor, whole[name][some])
    for name, tensor in dataset[7].items():
        assert torch.equal(tensor, whole[name][7])
    resumed = next(batches(dataset, 2, first=10))
    assert torch.equal(resumed["frames"], whole["frames"][10:12])
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_a_data_loader_reads_whole_batches() -> None:
    dataset = WindowDataset(numbered_windows(8, 1))
    loader = DataLoader(dataset, batch_size=16, collate_fn=lambda batch: batch)
    mine = list(batches(dataset, 16))
    for theirs, batch in zip(loader, mine, strict=True):
        assert theirs.keys() == {"frames", "labels", "carried"}
        assert all(torch.equal(theirs[name], batch[name]) for name in batch)
    assert mine[0]["frames"].shape == (16, 8, 287)
    assert mine[0]["carried"].dtype == torch.bool


def window_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("window-batches")]


def test_the_thread_ends_with_its_iterator() -> None:
    dataset = WindowDataset(numbered_windows(8, 1))
    iterator = batches(dataset, 4)
    next(iterator)
    assert window_threads()
    iterator.close()
    assert not window_threads()
    assert sum(len(batch["frames"]) for batch in batches(dataset, 4)) == len(dataset)
    assert not window_threads()


class Failing(WindowDataset):
    def __getitems__(self, samples: Any) -> Any:
        if samples[0] >= 8:
            raise RuntimeError("no such batch")
        return super().__getitems__(samples)


def test_an_error_in_the_background_is_raised_to_the_reader() -> None:
    read = []
    with pytest.raises(RuntimeError, match="no such batch"):
        read.extend(batches(Failing(numbered_windows(8, 1)), 4))
    assert not window_threads()


class Counting(WindowDataset):
    made = 0

    def __getitems__(self, samples: Any) -> Any:
        self.made += 1
        return super().__getitems__(samples)


def test_no_more_batches_are_made_than_asked_ahead() -> None:
    dataset = Counting(numbered_windows(8, 1))
    iterator = batches(dataset, 4, ahead=3)
    next(iterator)
    wait_for(lambda: dataset.made == 4)
    time.sleep(0.1)
    assert dataset.made == 4
    iterator.close()


def test_a_view_of_the_windows_takes_no_memory() -> None:
    windows = numbered_windows(8, 1)
    assert np.shares_memory(windows._frames, windows.table.frames)
    assert windows._frames.shape == (sum(SIZES) - 7, 8 * FRAME_WIDTH)

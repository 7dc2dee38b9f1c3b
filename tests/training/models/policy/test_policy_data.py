"""Replays and synthetic games: the layout against a loop over frames, causality, and files that must be left out."""

import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes.errors import InputError
from runtimes.pipelines.policy.melee import (
    BUTTONS,
    COLUMNS,
    FRAME_WIDTH,
    ID_COLUMNS,
    ID_COUNTS,
    STAGES,
    STICKS,
    unpack_labels,
)
from runtimes.pipelines.policy.pipeline import PolicyPipeline
from training.models.policy import data
from training.models.policy.data import Unusable, read_replay, read_replays, split_by_game, synthetic_games

REPLAYS = Path(os.environ.get("SLIPWAY_DATA", Path(__file__).parents[4] / "../shared/data")) / "replays"
FOX = REPLAYS / "fox_multishine.slp"
MEWTWO = REPLAYS / "mewtwo_dtilt_uptilt_dense.slp"
needs_replays = pytest.mark.skipif(not FOX.exists(), reason=f"no replays at {REPLAYS}")
peppi_py = pytest.importorskip("peppi_py")


def projectiles_of(items: list[dict[str, Any]], own: int) -> list[dict[str, Any]]:
    return [
        {"mine": item["owner"] == own, "x": item["position"]["x"], "y": item["position"]["y"], "type": item["type"],
         "speed_x": item["velocity"]["x"], "speed_y": item["velocity"]["y"]}
        for item in items
    ]  # fmt: skip


def state_of(replay: Any, items: Any, t: int, own: int) -> dict[str, Any]:
    """Frame t of a replay as a live feed would send it, one scalar at a time: the slow and obvious way."""

    def player(port: int) -> dict[str, Any]:
        post = replay.frames.ports[port].leader.post
        speeds = post.velocities
        hurt = int(post.state_flags[3][t].as_py()) & 2  # the replay's own hitstun flag
        numbers = {
            "percent": post.percent, "x": post.position.x, "y": post.position.y, "jumps_left": post.jumps,
            "shield_strength": post.shield, "speed_air_x_self": speeds.self_x_air, "stock": post.stocks,
            "speed_ground_x_self": speeds.self_x_ground, "speed_y_self": speeds.self_y, "action": post.state,
            "speed_x_attack": speeds.knockback_x, "speed_y_attack": speeds.knockback_y, "character": post.character,
            "action_frame": post.state_age,
        }  # fmt: skip
        return {name: column[t].as_py() for name, column in numbers.items()} | {
            "facing": post.direction[t].as_py() == 1.0,
            "invulnerable": post.hurtbox_state[t].as_py() > 0,
            "on_ground": not post.airborne[t].as_py(),
            "hitstun_frames_left": post.misc_as[t].as_py() if hurt else 0.0,
            "nana": None,
        }

    stage = next(name for name, number in STAGES.items() if number == replay.start.stage)
    return {
        "frame": replay.frames.id[t].as_py(), "stage": stage, "name_id": 0, "own": player(own),
        "opponent": player(1 - own), "controller": controller_of(replay, t, own),
        "projectiles": projectiles_of(items[t].as_py(), own),
    }  # fmt: skip


def controller_of(replay: Any, t: int, own: int) -> dict[str, Any]:
    pre = replay.frames.ports[own].leader.pre
    masks = dict(zip(BUTTONS, (0x100, 0x200, 0x400, 0x800, 0x10, 0x40, 0x20, 0x8), strict=True))
    pressed = pre.buttons_physical[t].as_py()
    return {
        "buttons": {button: bool(pressed & mask) for button, mask in masks.items()},
        "main_stick": [(pre.joystick.x[t].as_py() + 1) / 2, (pre.joystick.y[t].as_py() + 1) / 2],
        "c_stick": [(pre.cstick.x[t].as_py() + 1) / 2, (pre.cstick.y[t].as_py() + 1) / 2],
        "shoulder": max(pre.triggers_physical.l[t].as_py(), pre.triggers_physical.r[t].as_py()),
    }


@needs_replays
@pytest.mark.parametrize("own", [0, 1])
@pytest.mark.parametrize("path", [FOX, MEWTWO], ids=lambda path: path.stem)
def test_a_replay_equals_a_live_feed_of_it(path: Path, own: int) -> None:
    replay = peppi_py.read_slippi(str(path))
    items = peppi_py._peppi.read_slippi(str(path), False).frames.field("item")
    game = read_replay(path)[own]
    assert len(game.frames) == len(replay.frames.id) - 1
    rows = [*range(0, len(game.frames), 23), len(game.frames) - 1][:500]
    frames = [state_of(replay, items, t, own) for t in rows]
    np.testing.assert_array_equal(
        PolicyPipeline({}, Path(".")).encode([{"frames": frames}])["frames"][0], game.frames[rows]
    )


@needs_replays
@pytest.mark.parametrize("delay", [0, 3])
def test_a_label_is_the_controller_after_the_state(delay: int) -> None:
    replay = peppi_py.read_slippi(str(MEWTWO))
    game = read_replay(MEWTWO, delay=delay)[0]
    assert len(game.frames) == len(game.labels) == len(replay.frames.id) - 1 - delay
    heads = unpack_labels(game.labels)
    for t in [*range(0, len(game.labels), 41), len(game.labels) - 1]:
        want = controller_of(replay, t + 1 + delay, 0)
        assert dict(zip(BUTTONS, map(bool, heads["buttons"][t]), strict=True)) == want["buttons"]
        values = [*want["main_stick"], *want["c_stick"]]
        assert [heads[axis][t] for axis in STICKS] == [int(16 * v + 0.5) for v in values]
        assert heads["shoulder"][t] == int(4 * want["shoulder"] + 0.5)


@needs_replays
def test_no_row_holds_its_own_label() -> None:
    game = read_replay(MEWTWO)[0]
    previous = game.frames[:, COLUMNS["controller"]][:, :8]
    pressed = unpack_labels(game.labels)["buttons"]
    np.testing.assert_array_equal(previous[1:], pressed[:-1])
    assert (previous != pressed).any()


@needs_replays
def test_both_views_of_a_replay_are_games_of_one_group() -> None:
    games, skipped = read_replays(REPLAYS)
    assert not skipped
    assert len(games) == 6
    assert len({game.name for game in games}) == 6
    assert len({game.group for game in games}) == 3
    mine, yours = games[:2]
    np.testing.assert_array_equal(mine.frames[:, COLUMNS["own"]], yours.frames[:, COLUMNS["opponent"]])
    assert len(read_replays(REPLAYS, perspectives=[1])[0]) == 3


@needs_replays
def test_a_broken_replay_is_left_out_with_a_reason(tmp_path: Path) -> None:
    whole = FOX.read_bytes()
    shutil.copy(FOX, tmp_path / "good.slp")
    cuts = (0, 1, 15, 100, 1000, len(whole) // 2, len(whole) - 1)
    broken = {f"cut{cut}": whole[:cut] for cut in cuts} | {
        "random": random.Random(0).randbytes(5000),
        "text": b"not a replay\n",
        "panic": whole[:191] + bytes([whole[191] ^ 255]) + whole[192:],
    }
    for name, content in broken.items():
        (tmp_path / f"{name}.slp").write_bytes(content)
    (tmp_path / "folder.slp").mkdir()
    games, skipped = read_replays(tmp_path)
    assert [game.name for game in games] == ["good:P1", "good:P2"]
    assert sorted(path.stem for path, _ in skipped) == sorted([*broken, "folder"])
    assert all(reason and len(reason.splitlines()) == 1 for _, reason in skipped)
    assert "panicked" in {path.stem: reason for path, reason in skipped}["panic"]


@needs_replays
def test_flipped_bytes_never_end_in_a_crash(tmp_path: Path) -> None:
    whole, rng, path, refused = FOX.read_bytes(), random.Random(0), tmp_path / "flipped.slp", 0
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(rng.choice([1, 50])):
            content[rng.randrange(rng.choice([3000, len(content)]))] ^= rng.randrange(1, 256)
        path.write_bytes(content)
        try:
            games = read_replay(path)
        except Unusable:
            refused += 1
        else:
            assert all(np.isfinite(game.frames).all() for game in games)
            ids = np.concatenate([game.frames[:, ID_COLUMNS:] for game in games])
            assert ((ids >= 0) & (ids < ID_COUNTS)).all()
    assert 0 < refused < 60


def test_a_folder_without_a_usable_replay_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found nothing"):
        read_replays(tmp_path / "absent")
    with pytest.raises(InputError, match="expected at least one usable"):
        read_replays(tmp_path)
    (tmp_path / "empty.slp").touch()
    with pytest.raises(InputError, match=r"the first of 1: empty\.slp: peppi cannot read it"):
        read_replays(tmp_path)


@needs_replays
def test_a_label_before_its_state_is_refused() -> None:
    with pytest.raises(InputError, match="expected a delay of 0 or more"):
        read_replay(FOX, delay=-1)
    with pytest.raises(Unusable, match="expected more than 5000 frames, found 1901"):
        read_replay(FOX, delay=4999)


@needs_replays
def test_of_a_frame_played_twice_the_last_counts() -> None:
    pa = pytest.importorskip("pyarrow")
    frames = data._parse(FOX).frames
    twice = frames.take(pa.array([0, 1, 2, 3, 2, 3, 4]))
    assert data._final_frames(twice).field("id").to_pylist() == [-123, -122, -121, -120, -119]
    with pytest.raises(Unusable, match="gap after frame -122"):
        data._final_frames(frames.take(pa.array([0, 1, 3])))


@needs_replays
def test_followers_and_items_reach_their_columns() -> None:
    pa = pytest.importorskip("pyarrow")
    frames = data._parse(MEWTWO).frames.slice(1000, 4)
    ports = {name: frames.field("ports").field(name).field("leader") for name in ("P1", "P2")}
    present = pa.array([False, True, True, False])  # a mask of what is absent
    nana = pa.StructArray.from_arrays(ports["P1"].flatten(), fields=list(ports["P1"].type), mask=present)
    climber = pa.StructArray.from_arrays([ports["P1"], nana], ["leader", "follower"])
    other = pa.StructArray.from_arrays([ports["P2"]], ["leader"])
    point = {"x": 40.0, "y": -20.0}
    items = [[], [{"type": 50, "position": point, "velocity": point, "owner": i % 2} for i in range(7)], [], []]
    table = pa.StructArray.from_arrays(
        [frames.field("id"), pa.StructArray.from_arrays([climber, other], ["P1", "P2"]), pa.array(items)],
        ["id", "ports", "item"],
    )
    rows = data.encode_frames(data._raw(table, "P1", "P2", 32))
    nana_columns = rows[:, 17:56]
    np.testing.assert_array_equal(nana_columns[:, 0], [1, 0, 0, 1])
    np.testing.assert_array_equal(nana_columns[0, 1:3], rows[0, 2:4])  # where she stands, as her leader does
    assert nana_columns[0, 38] == 1  # and in the same class of action
    assert not nana_columns[1:3].any()
    projectiles = rows[:, COLUMNS["projectiles"]].reshape(4, 5, 7)
    np.testing.assert_allclose(projectiles[1, 0], [1, 1, 2, -1, 0.5, 10, -10])
    assert list(projectiles[1, :, 1]) == [1, 0, 1, 0, 1]
    assert not projectiles[[0, 2, 3]].any()


def test_synthetic_games_have_the_layout_and_repeat() -> None:
    games, again, other = synthetic_games(3, 2, 200), synthetic_games(3, 2, 200), synthetic_games(4, 2, 200)
    assert games[0].frames.shape == (199, FRAME_WIDTH)
    assert games[0].labels.shape == (199, 6)
    np.testing.assert_array_equal(games[1].frames, again[1].frames)
    assert (games[0].frames != other[0].frames).any()
    assert np.abs(games[0].frames[:, :ID_COLUMNS]).max() <= 10
    with pytest.raises(InputError):
        synthetic_games(0, 1, 1)


def test_a_synthetic_label_follows_from_the_state_and_from_a_memory() -> None:
    game = synthetic_games(0, 1, 4000)[0]
    heads, memory = unpack_labels(game.labels), 0
    for t, row in enumerate(game.frames):
        action, dx = int(row[284]), row[245] * 200
        memory = action if action in (data.ATTACK, data.SHIELD) else memory
        dash = action == data.DASH
        assert heads["buttons"][t, 1] == (dash and memory == data.ATTACK)
        assert heads["shoulder"][t] == 4 * (dash and memory == data.SHIELD)
        assert heads["buttons"][t, 0] == (abs(dx) < 15)


def test_no_column_of_a_row_has_the_information_that_needs_memory() -> None:
    game = synthetic_games(0, 1, 8000)[0]
    dash = game.frames[:, 284] == data.DASH
    rows = np.flatnonzero(dash[1:] & ~dash[:-1]) + 1  # after two dashes the previous controller does tell
    answer = unpack_labels(game.labels)["buttons"][rows, 1]
    assert 0.4 < answer.mean() < 0.6
    columns = game.frames[rows][:, game.frames[rows].std(axis=0) > 1e-3]
    assert np.abs(np.corrcoef(columns.T, answer)[-1, :-1]).max() < 0.15


def test_a_group_is_never_on_both_sides_of_a_split() -> None:
    games = [game for game in synthetic_games(0, 20, 10) for _ in range(2)]  # two views of each
    train, valid = split_by_game(games, 0.1, seed=1)
    assert (len(train), len(valid)) == (36, 4)
    assert not {game.group for game in train} & {game.group for game in valid}
    assert [game.name for game in split_by_game(games, 0.1, seed=1)[1]] == [game.name for game in valid]
    assert any(split_by_game(games, 0.1, seed=s)[1][0].name != valid[0].name for s in range(2, 6))
    assert len(split_by_game(games, 0.001, seed=0)[1]) == 2
    assert split_by_game(games, 0, seed=0) == (games, [])
    with pytest.raises(InputError, match="2 or more replays"):
        split_by_game(games[:2], 0.1, seed=0)

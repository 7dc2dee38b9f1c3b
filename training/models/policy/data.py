"""Training games: Slippi replays, or synthetic ones of the same layout with a rule that needs memory.

Row t of a game holds the state after frame t together with the controller that led to it; its label is the controller
of frame t + 1 + delay. A replay stores each input with the state it produced, so that pairing them unchanged would put
the label into the input.

Shapes: F frames, D = 287 columns, 6 label bytes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.errors import InputError, one_line, require
from runtimes.pipelines.policy.melee import BUTTONS, PROJECTILE_COUNT, STAGES, encode_frames, pack_labels
from runtimes.tensors import is_finite

BUTTON_BITS = {"A": 8, "B": 9, "X": 10, "Y": 11, "Z": 4, "L": 6, "R": 5, "D_UP": 3}  # of the physical controller
WAIT, DASH, ATTACK, SHIELD = 14, 20, 50, 179  # the actions of a synthetic opponent

Raw = dict[str, np.ndarray]


class Unusable(InputError):
    """A replay that cannot be used; the text has the reason."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Game:
    """One player's view of one game: frames float32 [F, 287], labels uint8 [F, 6].

    `group` is the same for every view of a replay, so that no replay is on both sides of a split.
    """

    name: str
    group: str
    frames: np.ndarray
    labels: np.ndarray


def read_replays(
    folder: str | Path, *, perspectives: Sequence[int] = (0, 1), delay: int = 0
) -> tuple[list[Game], list[tuple[Path, str]]]:
    """The games of every .slp file below `folder`, and the files left out, each with its reason.

    `InputError` if the folder does not exist or holds no usable replay.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(
            f"expected a folder of .slp replays at {root}, found {'a file' if root.exists() else 'nothing'}"
        )
    games: list[Game] = []
    skipped: list[tuple[Path, str]] = []
    for path in sorted(root.rglob("*.slp")):
        try:
            games += read_replay(path, perspectives=perspectives, delay=delay)
        except Unusable as error:
            skipped.append((path, str(error)))
    if not games:
        first = f"; the first of {len(skipped)}: {skipped[0][0].name}: {skipped[0][1]}" if skipped else ""
        raise InputError(f"expected at least one usable .slp replay below {root}, found none{first}")
    return games, skipped


def read_replay(path: str | Path, *, perspectives: Sequence[int] = (0, 1), delay: int = 0) -> list[Game]:
    """One game per perspective: 0 is the player on the lower port. `Unusable` with the reason for another file."""
    path = Path(path)
    replay = _parse(path)
    players = replay.start["players"]
    if len(players) != 2:
        raise Unusable(f"expected 2 players, found {len(players)}")
    frames = _final_frames(replay.frames)
    ports = [player["port"] for player in players]
    games = []
    for own in perspectives:
        raw = _raw(frames, ports[own], ports[1 - own], replay.start["stage"])
        games.append(_game(f"{path.stem}:{ports[own]}", str(path), raw, delay))
    return games


def split_by_game(games: Sequence[Game], valid_share: float, seed: int) -> tuple[list[Game], list[Game]]:
    """Training and validation games; whole groups go to one side, at least one to each unless the share is 0."""
    groups = sorted({game.group for game in games})
    if valid_share <= 0:
        return list(games), []
    if len(groups) < 2 or valid_share >= 1:
        raise InputError(
            f"expected 2 or more replays and a share below 1 to hold some out, found {len(groups)} and {valid_share}; "
            "add replays or set the share to 0"
        )
    count = min(max(round(valid_share * len(groups)), 1), len(groups) - 1)
    held_out = set(np.random.default_rng(seed).permutation(groups)[:count])
    train = [game for game in games if game.group not in held_out]
    return train, [game for game in games if game.group in held_out]


def synthetic_games(seed: int, games: int, frames: int) -> list[Game]:
    """Games whose next controller follows from the current state and from the opponent's last action, some frames ago.

    After a dash the player presses B if the last action was an attack, and the shoulder if it was a shield: only a
    model with memory can predict which. The rest needs no memory.
    """
    if frames < 2:
        raise InputError(f"expected 2 or more frames in a synthetic game, found {frames}")
    rng = np.random.default_rng(seed)
    return [_game(f"synthetic{i}", f"synthetic{i}", _synthetic_raw(rng, frames), 0) for i in range(games)]


def _game(name: str, group: str, raw: Raw, delay: int) -> Game:
    if delay < 0:
        raise InputError(f"expected a delay of 0 or more frames, found {delay}; a label before its state would leak")
    ahead = 1 + delay
    count = len(raw["frame"])
    if count <= ahead:
        raise Unusable(f"expected more than {ahead} frames, found {count}")
    frames_FD = encode_frames({column: values[:-ahead] for column, values in raw.items()})
    if not is_finite(frames_FD):
        raise Unusable("expected finite numbers, found NaN")
    return Game(name=name, group=group, frames=frames_FD, labels=pack_labels(raw)[ahead:])


def _parse(path: Path) -> Any:
    # The public reader drops the items; it is a thin wrapper of this one, and the version is pinned.
    peppi = require("peppi_py._peppi", extra="train")
    try:
        replay = peppi.read_slippi(str(path), False)
    except OSError as error:
        raise Unusable(f"peppi cannot read it: {one_line(error)}") from error
    except BaseException as error:
        # A corrupt file can panic the Rust parser, and a panic is no Exception. Its class cannot be imported.
        if type(error).__name__ != "PanicException":
            raise
        raise Unusable(f"peppi panicked on it: {one_line(error)}") from error
    if replay.frames is None or len(replay.frames) == 0:
        raise Unusable("expected frames, found none")
    return replay


def _final_frames(frames: Any) -> Any:
    """The arrow table with one row per frame number: the last, since a rollback plays a frame again."""
    ids = frames.field("id").to_numpy()
    numbers, from_end = np.unique(ids[::-1], return_index=True)
    if len(numbers) != int(numbers[-1]) - int(numbers[0]) + 1:
        gap = numbers[np.flatnonzero(np.diff(numbers) != 1)[0]]
        raise Unusable(f"expected consecutive frames, found a gap after frame {gap}")
    return frames if len(numbers) == len(ids) else frames.take(len(ids) - 1 - from_end)


def _raw(frames: Any, own: str, opponent: str, stage: int) -> Raw:
    ports = frames.field("ports")
    known = list(STAGES.values())
    stage_index = known.index(stage) if stage in known else len(known) - 1
    raw = {"frame": _column(frames, "id"), "stage": np.full(len(frames), stage_index)}
    for side, port in (("own", own), ("opponent", opponent)):
        raw |= _player(ports.field(port), side)
    raw |= _controller(ports.field(own).field("leader").field("pre"))
    return raw | _projectiles(frames, int(own.removeprefix("P")) - 1)


# The place of each raw value of a player in a post-frame event, and its type. Hitstun shares its word with other
# counters, which `encode_frames` separates.
_POST: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray] | None]] = {
    "action": ("state", None),
    "character": ("character", None),
    "percent": ("percent", None),
    "facing": ("direction", lambda direction: direction > 0),
    "x": ("position.x", None),
    "y": ("position.y", None),
    "invulnerable": ("hurtbox_state", lambda state: state != 0),
    "jumps_left": ("jumps", None),
    "shield_strength": ("shield", None),
    "on_ground": ("airborne", lambda airborne: airborne == 0),
    "speed_air_x_self": ("velocities.self_x_air", None),
    "speed_ground_x_self": ("velocities.self_x_ground", None),
    "speed_y_self": ("velocities.self_y", None),
    "speed_x_attack": ("velocities.knockback_x", None),
    "speed_y_attack": ("velocities.knockback_y", None),
    "hitstun_frames_left": ("misc_as", None),
    "action_frame": ("state_age", None),
    "stock": ("stocks", None),
}
_NANA = ("action", "percent", "facing", "x", "y", "invulnerable", "on_ground", "hitstun_frames_left", "action_frame",
         "stock")  # fmt: skip


def _player(port: Any, side: str) -> Raw:
    if port.field("leader").null_count:
        raise Unusable("expected both players on every frame, found one missing")
    raw = _post(port.field("leader").field("post"), tuple(_POST), side)
    if (follower := _child(port, "follower")) is not None:
        raw |= _post(follower.field("post"), _NANA, f"{side}.nana")
        raw[f"{side}.nana.exists"] = np.asarray(follower.is_valid())
    return raw


def _post(post: Any, names: Sequence[str], prefix: str) -> Raw:
    raw = {}
    for name in names:
        path, convert = _POST[name]
        values = _column(post, path)
        if values is not None:  # old replays lack the later fields: zeros
            raw[f"{prefix}.{name}"] = convert(values) if convert else values
    return raw


def _controller(pre: Any) -> Raw:
    pressed = _column(pre, "buttons_physical")
    raw = {f"controller.{button}": pressed >> BUTTON_BITS[button] & 1 for button in BUTTONS}
    for stick, name in (("main", "joystick"), ("c", "cstick")):
        for axis in "xy":  # -1..1 in a replay, 0..1 in a raw value
            raw[f"controller.{stick}_{axis}"] = np.clip((_column(pre, f"{name}.{axis}") + 1.0) / 2, 0, 1)
    triggers = [_column(pre, f"triggers_physical.{side}") for side in "lr"]
    raw["controller.shoulder"] = np.clip(np.maximum(*triggers), 0, 1)
    return raw


def _projectiles(frames: Any, own_port: int) -> Raw:
    """The first items of each frame, in the order of the replay."""
    items = _child(frames, "item")
    if items is None or len(items.values) == 0:
        return {}
    offsets = items.offsets.to_numpy()
    paths = {"x": "position.x", "y": "position.y", "type": "type", "speed_x": "velocity.x", "speed_y": "velocity.y"}
    flat = {name: _column(items.values, path) for name, path in paths.items()}
    owner = _column(items.values, "owner")
    flat["mine"] = np.zeros(len(items.values)) if owner is None else owner == own_port
    raw = {}
    for slot in range(PROJECTILE_COUNT):
        exists = offsets[:-1] + slot < offsets[1:]
        index = np.where(exists, offsets[:-1] + slot, 0)
        raw[f"projectile.{slot}.exists"] = exists
        raw |= {f"projectile.{slot}.{name}": np.where(exists, values[index], 0) for name, values in flat.items()}
    return raw


def _child(struct: Any, name: str) -> Any:
    return struct.field(name) if struct.type.get_field_index(name) >= 0 else None


def _column(struct: Any, path: str) -> Any:
    for name in path.split("."):
        struct = _child(struct, name)
        if struct is None:
            return None
    values = struct.to_numpy(zero_copy_only=False)
    return values.astype(np.float64) if values.dtype.kind == "f" else values  # a live feed computes in doubles


def _synthetic_raw(rng: np.random.Generator, frames: int) -> Raw:
    own_x, own_y, opponent_x, opponent_y = (_drift(rng, frames, reach) for reach in (60, 20, 60, 20))
    opponent_action = rng.choice([WAIT, DASH, ATTACK, SHIELD], frames, p=[0.5, 0.3, 0.1, 0.1])
    raw = {
        "frame": np.arange(frames), "stage": np.full(frames, list(STAGES).index("FINAL_DESTINATION")),
        "own.x": own_x, "own.y": own_y, "own.facing": opponent_x > own_x, "own.character": np.full(frames, 1),
        "own.action": np.full(frames, WAIT), "opponent.x": opponent_x, "opponent.y": opponent_y,
        "opponent.facing": own_x > opponent_x, "opponent.character": np.full(frames, 2),
        "opponent.action": opponent_action,
    }  # fmt: skip
    for side in ("own", "opponent"):
        raw |= {f"{side}.stock": np.full(frames, 4), f"{side}.shield_strength": np.full(frames, 60.0),
                f"{side}.on_ground": np.ones(frames), f"{side}.jumps_left": np.full(frames, 2)}  # fmt: skip
    return raw | _synthetic_controller(opponent_x - own_x, opponent_y - own_y, opponent_action)


def _synthetic_controller(dx: np.ndarray, dy: np.ndarray, action: np.ndarray) -> Raw:
    """The controller of frame t: walk towards the opponent of frame t-1, and answer its dash."""
    frames = len(dx)
    told = np.isin(action, (ATTACK, SHIELD))
    last_told = np.maximum.accumulate(np.where(told, np.arange(frames), -1))
    remembered = np.where(last_told >= 0, action[last_told], WAIT)
    intent: Raw = {button: np.zeros(frames) for button in BUTTONS} | {
        "A": np.abs(dx) < 15,
        "B": (action == DASH) & (remembered == ATTACK),
        "main_x": np.where(np.abs(dx) < 5, 0.5, dx > 0),
        "main_y": np.where(np.abs(dy) < 5, 0.5, dy > 0),
        "c_x": np.full(frames, 0.5),
        "c_y": np.full(frames, 0.5),
        "shoulder": (action == DASH) & (remembered == SHIELD),
    }
    at_rest = {"main_x": 0.5, "main_y": 0.5, "c_x": 0.5, "c_y": 0.5}
    return {
        f"controller.{name}": np.concatenate([[at_rest.get(name, 0.0)], values[:-1]]) for name, values in intent.items()
    }


def _drift(rng: np.random.Generator, frames: int, reach: float) -> np.ndarray:
    """A smooth path within -reach..reach."""
    periods, phases = rng.uniform(60, 400, 2), rng.uniform(0, 2 * np.pi, 2)
    return reach / 2 * np.sin(2 * np.pi * np.arange(frames)[:, None] / periods + phases).sum(axis=1)

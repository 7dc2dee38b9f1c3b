"""One instant of Melee as 287 numbers, and a controller as six small labels: the same for replays and for live play.

Raw values carry the names and units of a libmelee feed: positions in game units, sticks in 0..1 with 0.5 at rest
(replays store -1..1), actions and characters by the game's own ids. Layout and scales follow ExPhil's frame embedding.

Shapes: F frames, D = FRAME_WIDTH columns.
"""

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import numpy as np

BUTTONS = ("A", "B", "X", "Y", "Z", "L", "R", "D_UP")
STICKS = ("main_x", "main_y", "c_x", "c_y")
HEADS = {"buttons": len(BUTTONS), **dict.fromkeys(STICKS, 17), "shoulder": 5}
LABEL_WIDTH = len(HEADS)

STAGES = {
    "FOUNTAIN_OF_DREAMS": 2,
    "POKEMON_STADIUM": 3,
    "YOSHIS_STORY": 8,
    "DREAMLAND": 28,
    "BATTLEFIELD": 31,
    "FINAL_DESTINATION": 32,
    "OTHER": None,
}  # libmelee's names; the ids are those in a replay, libmelee numbers stages otherwise

ACTION_COUNT = 399
CHARACTER_COUNT = 33
NAME_COUNT = 112
PROJECTILE_COUNT = 5
GAME_LIMIT_FRAMES = 8 * 60 * 60
STAGE_EDGE_X = 85.0
SCALED_LIMIT = 10.0  # no column but the ids ever leaves -10..10


class Field(NamedTuple):
    """A raw value and the column it becomes: clip(value * scale + offset, low, high)."""

    name: str
    kind: Literal["number", "flag", "unit"]  # a unit is a number in 0..1
    scale: float = 1.0
    low: float = -SCALED_LIMIT
    high: float = SCALED_LIMIT
    offset: float = 0.0


PLAYER_FIELDS = (
    Field("percent", "number", 0.01, 0, 5),
    Field("facing", "flag", 2, -1, 1, -1),  # true is right
    Field("x", "number", 0.05),
    Field("y", "number", 0.05),
    Field("invulnerable", "flag"),
    Field("jumps_left", "number", 1 / 6, 0, 1),
    Field("shield_strength", "number", 0.01, 0, 1),
    Field("on_ground", "flag"),
    Field("speed_air_x_self", "number", 0.5),
    Field("speed_ground_x_self", "number", 0.5),
    Field("speed_y_self", "number", 0.5),
    Field("speed_x_attack", "number", 0.5),
    Field("speed_y_attack", "number", 0.5),
    Field("hitstun_frames_left", "number", 1 / 120, 0, 1),
    Field("action_frame", "number", 1 / 60, 0, 2),
    Field("stock", "number", 1 / 4, 0, 1),
)
_BY_NAME = {field.name: field for field in PLAYER_FIELDS}
NANA_FIELDS = tuple(
    _BY_NAME[name]
    for name in ("x", "y", "facing", "on_ground", "percent", "stock", "hitstun_frames_left", "action_frame",
                 "invulnerable")
)  # fmt: skip
PROJECTILE_FIELDS = (
    Field("mine", "flag"),
    Field("x", "number", 0.05),
    Field("y", "number", 0.05),
    Field("type", "number", 0.01),
    Field("speed_x", "number", 0.5),
    Field("speed_y", "number", 0.5),
)
CONTROLLER_FIELDS = (
    *(Field(button, "flag") for button in BUTTONS),
    *(Field(axis, "unit", 2, -1, 1, -1) for axis in STICKS),
    Field("shoulder", "unit"),
)

# The first action of each run of Nana's 399 states, and its class. Ids: the game's motion states, her own from 341.
ACTION_CLASSES = (
    "dead", "entry", "idle", "walk", "dash", "jump_squat", "jump", "fall", "land", "crouch", "attack_ground",
    "attack_smash", "attack_air", "special_n", "special_s", "special_u", "special_d", "grab", "throw", "grabbed",
    "shield", "dodge", "damage", "down", "ledge",
)  # fmt: skip
_ACTION_RUNS = {
    0: "dead", 11: "entry", 14: "idle", 15: "walk", 18: "dash", 24: "jump_squat", 25: "jump", 29: "fall", 39: "crouch",
    42: "land", 44: "attack_ground", 58: "attack_smash", 65: "attack_air", 70: "land", 75: "damage",
    92: "attack_ground", 178: "shield", 183: "down", 205: "damage", 212: "grab", 219: "throw", 223: "grabbed",
    233: "dodge", 237: "damage", 239: "grabbed", 244: "fall", 245: "idle", 247: "damage", 251: "fall", 252: "ledge",
    264: "idle", 266: "grabbed", 322: "entry", 325: "grabbed", 341: "special_n", 343: "special_s", 347: "special_u",
    356: "special_d",
}  # fmt: skip
_RUN_STARTS = np.array(list(_ACTION_RUNS))
_RUN_CLASSES = np.array([ACTION_CLASSES.index(name) for name in _ACTION_RUNS.values()])
_ATTACKING = np.isin(np.arange(25), range(10, 17))
_GRABBING = np.isin(np.arange(25), (17, 18))
_CAN_ACT = np.isin(np.arange(25), (2, 3, 4, 6, 7, 9))
_IN_HITSTUN = np.isin(np.arange(ACTION_COUNT), (*range(75, 92), 185, 193))  # Damage* and DownDamage*

_PLAYER_WIDTH = len(PLAYER_FIELDS) + 1 + 1 + len(NANA_FIELDS) + len(ACTION_CLASSES) + 4  # ledge, Nana exists, her flags
_WIDTHS = {
    "own": _PLAYER_WIDTH,
    "opponent": _PLAYER_WIDTH,
    "stage": len(STAGES),
    "controller": len(CONTROLLER_FIELDS),
    "name": NAME_COUNT,
    "spatial": 4,
    "projectiles": PROJECTILE_COUNT * (1 + len(PROJECTILE_FIELDS)),
    "actions": 2,
    "characters": 2,
}


def _slices(widths: Mapping[str, int]) -> Iterator[tuple[str, slice]]:
    start = 0
    for name, width in widths.items():
        yield name, slice(start, start + width)
        start += width


COLUMNS = dict(_slices(_WIDTHS))
FRAME_WIDTH = sum(_WIDTHS.values())
ID_COLUMNS = FRAME_WIDTH - 4  # own action, opponent action, own character, opponent character
ID_COUNTS = (ACTION_COUNT, ACTION_COUNT, CHARACTER_COUNT, CHARACTER_COUNT)


def _raw_names() -> Iterator[str]:
    yield from ("frame", "stage", "name_id")
    for side in ("own", "opponent"):
        yield from (f"{side}.{name}" for name in ("action", "character", *_BY_NAME, "nana.exists", "nana.action"))
        yield from (f"{side}.nana.{field.name}" for field in NANA_FIELDS)
    yield from (f"controller.{field.name}" for field in CONTROLLER_FIELDS)
    for slot in range(PROJECTILE_COUNT):
        yield from (f"projectile.{slot}.{name}" for name in ("exists", *(field.name for field in PROJECTILE_FIELDS)))


RAW_NAMES = frozenset(_raw_names())


def encode_frames(raw: Mapping[str, np.ndarray]) -> np.ndarray:
    """float32 [F, 287] from raw columns [F] named as in `RAW_NAMES`; an absent column counts as zeros.

    `stage` is an index into `STAGES`; ids out of range are clipped; NaN stays NaN. KeyError for an unknown name.
    """
    if unknown := raw.keys() - RAW_NAMES:
        raise KeyError(f"unknown raw columns: {sorted(unknown)}")
    count = len(next(iter(raw.values())))
    zeros = np.zeros(count)
    columns = {name: np.asarray(raw.get(name, zeros), np.float64) for name in RAW_NAMES}
    frames_FD = np.zeros((count, FRAME_WIDTH), np.float32)
    for side in ("own", "opponent"):
        _player(columns, side, frames_FD[:, COLUMNS[side]])
    _one_hot(columns["stage"], frames_FD[:, COLUMNS["stage"]])
    _scale(columns, "controller", CONTROLLER_FIELDS, frames_FD[:, COLUMNS["controller"]])
    _one_hot(columns["name_id"], frames_FD[:, COLUMNS["name"]])
    _spatial(columns, frames_FD[:, COLUMNS["spatial"]])
    _projectiles(columns, frames_FD[:, COLUMNS["projectiles"]])
    ids = ("own.action", "opponent.action", "own.character", "opponent.character")
    for offset, (name, size) in enumerate(zip(ids, ID_COUNTS, strict=True)):
        frames_FD[:, ID_COLUMNS + offset] = _id(columns[name], size)
    return frames_FD


def to_bucket(value: np.ndarray | float, count: int) -> np.ndarray:
    """The bucket 0..count-1 nearest to a value in 0..1: trunc((count - 1) * value + 0.5), clipped."""
    scaled = (count - 1) * np.asarray(value, np.float64) + 0.5
    return np.clip(scaled, 0, count - 1).astype(np.uint8)


def from_bucket(bucket: np.ndarray | int, count: int) -> np.ndarray:
    """The value in 0..1 at the middle of a bucket; 0, 0.5 and 1 are unchanged by `to_bucket` and back."""
    return np.asarray(bucket, np.float64) / (count - 1)


def pack_labels(raw: Mapping[str, np.ndarray]) -> np.ndarray:
    """uint8 [F, 6] from the controller's raw columns: the buttons as bits in the order of `BUTTONS`, five buckets."""
    pressed = np.stack([np.asarray(raw[f"controller.{button}"]) != 0 for button in BUTTONS], axis=-1)
    axes = [to_bucket(raw[f"controller.{head}"], size) for head, size in HEADS.items() if head != "buttons"]
    return np.stack([np.packbits(pressed, axis=-1, bitorder="little")[..., 0], *axes], axis=-1)


def unpack_labels(labels: np.ndarray) -> dict[str, np.ndarray]:
    """One array per head from uint8 [..., 6]: buttons uint8 0/1 [..., 8], the other heads int64 buckets [...]."""
    heads = {"buttons": np.unpackbits(labels[..., :1], axis=-1, bitorder="little")}
    return heads | {head: labels[..., 1 + i].astype(np.int64) for i, head in enumerate([*STICKS, "shoulder"])}


def _player(columns: Mapping[str, np.ndarray], side: str, out: np.ndarray) -> None:
    width = len(PLAYER_FIELDS)
    columns = _with_hitstun(columns, side)
    _scale(columns, side, PLAYER_FIELDS, out)
    ledge = (STAGE_EDGE_X - np.abs(columns[f"{side}.x"])) / STAGE_EDGE_X  # 1 at the centre, negative off stage
    out[:, width] = np.clip(ledge, -SCALED_LIMIT, SCALED_LIMIT)
    _nana(_with_hitstun(columns, f"{side}.nana"), side, out[:, width + 1 :])


def _nana(columns: Mapping[str, np.ndarray], side: str, out: np.ndarray) -> None:
    scaled = 1 + len(NANA_FIELDS)
    exists = columns[f"{side}.nana.exists"] != 0
    action = _action_class(columns[f"{side}.nana.action"])
    out[:, 0] = exists
    _scale(columns, f"{side}.nana", NANA_FIELDS, out[:, 1:])
    _one_hot(action, out[:, scaled : scaled + len(ACTION_CLASSES)])
    together = action == _action_class(columns[f"{side}.action"])
    for i, flag in enumerate((_ATTACKING[action], _GRABBING[action], _CAN_ACT[action], together)):
        out[:, scaled + len(ACTION_CLASSES) + i] = flag
    out[~exists] = 0


def _projectiles(columns: Mapping[str, np.ndarray], out: np.ndarray) -> None:
    width = 1 + len(PROJECTILE_FIELDS)
    for slot in range(PROJECTILE_COUNT):
        exists = columns[f"projectile.{slot}.exists"] != 0
        if exists.any():
            part = out[:, slot * width : (slot + 1) * width]
            part[:, 0] = exists
            _scale(columns, f"projectile.{slot}", PROJECTILE_FIELDS, part[:, 1:])
            part[~exists] = 0


def _spatial(columns: Mapping[str, np.ndarray], out: np.ndarray) -> None:
    dx = columns["opponent.x"] - columns["own.x"]
    dy = columns["opponent.y"] - columns["own.y"]
    out[:, 0] = np.clip(np.hypot(dx, dy) / 200, 0, 1.5)
    out[:, 1] = np.clip(dx / 200, -SCALED_LIMIT, SCALED_LIMIT)
    out[:, 2] = np.clip(dy / 100, -SCALED_LIMIT, SCALED_LIMIT)
    out[:, 3] = np.clip(columns["frame"] / GAME_LIMIT_FRAMES, 0, 1)


def _with_hitstun(columns: Mapping[str, np.ndarray], who: str) -> dict[str, np.ndarray]:
    """The columns with hitstun zero in states without any, where the game keeps other counters in that word.

    Decided by the action and not by the replay's hitstun flag, which a live feed does not carry.
    """
    name = f"{who}.hitstun_frames_left"
    return {**columns, name: np.where(_IN_HITSTUN[_id(columns[f"{who}.action"], ACTION_COUNT)], columns[name], 0.0)}


def _scale(columns: Mapping[str, np.ndarray], prefix: str, fields: tuple[Field, ...], out: np.ndarray) -> None:
    for i, field in enumerate(fields):
        out[:, i] = np.clip(columns[f"{prefix}.{field.name}"] * field.scale + field.offset, field.low, field.high)


def _one_hot(ids: np.ndarray, out: np.ndarray) -> None:
    out[np.arange(len(ids)), _id(ids, out.shape[1])] = 1


def _action_class(actions: np.ndarray) -> np.ndarray:
    return _RUN_CLASSES[np.searchsorted(_RUN_STARTS, _id(actions, ACTION_COUNT), side="right") - 1]


def _id(values: np.ndarray, count: int) -> np.ndarray:
    return np.clip(values, 0, count - 1).astype(np.int64)

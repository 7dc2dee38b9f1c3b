"""Melee policies: a run of frames in, the controller to press next out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtimes.errors import InputError
from runtimes.pipeline import FLAG, Pipeline, Schema, array, choice, real, record, whole
from runtimes.pipelines.policy.melee import (
    ACTION_COUNT,
    BUTTONS,
    CHARACTER_COUNT,
    CONTROLLER_FIELDS,
    FRAME_WIDTH,
    HEADS,
    ID_COLUMNS,
    ID_COUNTS,
    NAME_COUNT,
    NANA_FIELDS,
    PLAYER_FIELDS,
    PROJECTILE_COUNT,
    PROJECTILE_FIELDS,
    SCALED_LIMIT,
    STAGES,
    Field,
    encode_frames,
    from_bucket,
)
from runtimes.tensors import require_finite

MAX_FRAMES = 512
NUMBER_LIMIT = 1e6  # far outside any game value, far inside float32

FRAME_KEYS = ("frame", "stage", "name_id", "own", "opponent", "controller", "projectiles")
PLAYER_KEYS = ("action", "character", *(field.name for field in PLAYER_FIELDS), "nana")
NANA_KEYS = ("action", *(field.name for field in NANA_FIELDS))
CONTROLLER_KEYS = ("buttons", "main_stick", "c_stick", "shoulder")
PROJECTILE_KEYS = tuple(field.name for field in PROJECTILE_FIELDS)

Raw = dict[str, float]


class PolicyPipeline(Pipeline):
    """A request is `{"frames": [...]}`, oldest first; a frame is a game state as `example` shows, or 287 numbers.

    An answer is the controller for the frame after the last one, deterministic: buttons pressed at p > 0.5, the
    likeliest bucket of each axis. Its first four keys can be the `controller` of the next frame as they are.
    """

    def encode(self, requests: Sequence[Any]) -> dict[str, np.ndarray]:
        """`frames` float32 [batch, time, 287]; every request of one call must hold the same number of frames."""
        runs = [_frames(request, f"request {i}") for i, request in enumerate(requests)]
        if not runs:
            raise InputError("expected at least one request, found none")
        for i, run in enumerate(runs):
            if len(run) != len(runs[0]):
                raise InputError(f"request {i}: expected {len(runs[0])} frames like request 0, found {len(run)}")
        return {"frames": np.stack([_encode_run(run, f"request {i}") for i, run in enumerate(runs)])}

    def decode(self, outputs: Mapping[str, np.ndarray]) -> list[Any]:
        """One controller per row from the logits [batch, time, width] of each head; `EngineError` if not finite."""
        logits = {head: np.asarray(outputs[head][:, -1], np.float64) for head in HEADS}
        require_finite(logits)
        return [_answer({head: logits[head][row] for head in HEADS}) for row in range(len(logits["buttons"]))]

    def schema(self) -> Schema:
        nana = record({"action": whole(0, ACTION_COUNT - 1), **_field_schemas(NANA_FIELDS)})
        ids = {"action": whole(0, ACTION_COUNT - 1), "character": whole(0, CHARACTER_COUNT - 1)}
        player = record({**ids, **_field_schemas(PLAYER_FIELDS), "nana": {"anyOf": [nana, {"type": "null"}]}})
        stick = array(real(0, 1), 2, 2)
        buttons = record(dict.fromkeys(BUTTONS, FLAG))
        controller = {"buttons": buttons, "main_stick": stick, "c_stick": stick, "shoulder": real(0, 1)}
        state = {
            "frame": real(-NUMBER_LIMIT, NUMBER_LIMIT),
            "stage": choice(list(STAGES)),
            "name_id": whole(0, NAME_COUNT - 1),
            "own": player,
            "opponent": player,
            "controller": record(controller),
            "projectiles": array(record(_field_schemas(PROJECTILE_FIELDS))),
        }
        vector = array({"type": "number"}, FRAME_WIDTH, FRAME_WIDTH)
        return record({"frames": array({"anyOf": [record(state), vector]}, 1, MAX_FRAMES)})

    def example(self) -> Any:
        own = {"action": 20, "character": 1, **_PLAYER_AT_REST, "x": -30.0, "speed_ground_x_self": 1.9}
        opponent = {"action": 14, "character": 2, **_PLAYER_AT_REST, "facing": False, "x": 30.0, "percent": 24.0}
        laser = {"mine": True, "x": -10.0, "y": 9.0, "type": 54, "speed_x": 7.0, "speed_y": 0.0}
        state = {
            "stage": "FINAL_DESTINATION", "name_id": 0, "own": own, "opponent": opponent,
            "controller": {"buttons": dict.fromkeys(BUTTONS, False), "main_stick": [1.0, 0.5], "c_stick": [0.5, 0.5],
                           "shoulder": 0.0},
        }  # fmt: skip
        return {"frames": [{"frame": 600 + i, **state, "projectiles": [laser] * i} for i in range(2)]}


_PLAYER_AT_REST = {
    "percent": 0.0, "facing": True, "x": 0.0, "y": 0.0, "invulnerable": False, "jumps_left": 2, "shield_strength": 60.0,
    "on_ground": True, "speed_air_x_self": 0.0, "speed_ground_x_self": 0.0, "speed_y_self": 0.0, "speed_x_attack": 0.0,
    "speed_y_attack": 0.0, "hitstun_frames_left": 0, "action_frame": 5, "stock": 4, "nana": None,
}  # fmt: skip


def _field_schemas(fields: Sequence[Field]) -> dict[str, Schema]:
    kinds = {"unit": real(0, 1), "number": real(-NUMBER_LIMIT, NUMBER_LIMIT), "flag": FLAG}
    return {field.name: kinds[field.kind] for field in fields}


def _answer(logits: Mapping[str, np.ndarray]) -> dict[str, Any]:
    pressed = 0.5 * (1 + np.tanh(0.5 * logits["buttons"]))  # the logistic function, without overflow
    axis = {h: float(from_bucket(int(logits[h].argmax()), size)) for h, size in HEADS.items() if h != "buttons"}
    return {
        "buttons": {button: bool(p > 0.5) for button, p in zip(BUTTONS, pressed, strict=True)},
        "main_stick": [axis["main_x"], axis["main_y"]],
        "c_stick": [axis["c_x"], axis["c_y"]],
        "shoulder": axis["shoulder"],
        "probabilities": {
            "buttons": {button: float(p) for button, p in zip(BUTTONS, pressed, strict=True)},
            **{head: _softmax(logits[head]) for head in axis},
        },
    }


def _softmax(logits: np.ndarray) -> list[float]:
    weights = np.exp(logits - logits.max())
    return (weights / weights.sum()).tolist()


def _frames(request: Any, where: str) -> list[Any]:
    frames = _object(request, ("frames",), where)["frames"]
    if not isinstance(frames, list) or not 1 <= len(frames) <= MAX_FRAMES:
        raise _wrong(where, "frames", f"a list of 1..{MAX_FRAMES} frames", frames)
    return frames


def _encode_run(frames: list[Any], where: str) -> np.ndarray:
    rows_FD = np.empty((len(frames), FRAME_WIDTH), np.float32)
    states: dict[int, Raw] = {}
    for i, frame in enumerate(frames):
        if isinstance(frame, list):
            rows_FD[i] = _vector(frame, f"{where}, frame {i}")
        else:
            states[i] = _state(frame, f"{where}, frame {i}")
    if states:
        names = {name for raw in states.values() for name in raw}
        columns = {name: np.array([raw.get(name, 0.0) for raw in states.values()]) for name in names}
        rows_FD[list(states)] = encode_frames(columns)
    return rows_FD


def _vector(numbers: list[Any], where: str) -> list[float]:
    if len(numbers) != FRAME_WIDTH:
        raise InputError(f"{where}: expected {FRAME_WIDTH} numbers, found {len(numbers)}")
    for column, number in enumerate(numbers[:ID_COLUMNS]):
        _number(number, where, column, -SCALED_LIMIT, SCALED_LIMIT)
    for column, count in enumerate(ID_COUNTS, ID_COLUMNS):
        _id(numbers[column], count, where, column)
    return numbers


def _state(frame: Any, where: str) -> Raw:
    _object(frame, FRAME_KEYS, where)
    raw = {
        "frame": _number(frame["frame"], where, "frame"),
        "stage": _stage(frame["stage"], where),
        "name_id": _id(frame["name_id"], NAME_COUNT, where, "name_id"),
    }
    for side in ("own", "opponent"):
        raw |= _player(frame[side], where, side)
    return raw | _controller(frame["controller"], where) | _projectiles(frame["projectiles"], where)


def _player(player: Any, where: str, side: str) -> Raw:
    _object(player, PLAYER_KEYS, where, side)
    raw = _fields(player, PLAYER_FIELDS, where, side)
    raw[f"{side}.action"] = _id(player["action"], ACTION_COUNT, where, f"{side}.action")
    raw[f"{side}.character"] = _id(player["character"], CHARACTER_COUNT, where, f"{side}.character")
    if (nana := player["nana"]) is not None:
        name = f"{side}.nana"
        _object(nana, NANA_KEYS, where, name)
        raw |= _fields(nana, NANA_FIELDS, where, name)
        raw[f"{name}.action"] = _id(nana["action"], ACTION_COUNT, where, f"{name}.action")
        raw[f"{name}.exists"] = 1.0
    return raw


def _controller(controller: Any, where: str) -> Raw:
    _object(controller, CONTROLLER_KEYS, where, "controller")
    flat = {**_object(controller["buttons"], BUTTONS, where, "controller.buttons"), "shoulder": controller["shoulder"]}
    for stick in ("main", "c"):
        pair = controller[f"{stick}_stick"]
        if not isinstance(pair, list) or len(pair) != 2:
            raise _wrong(where, f"controller.{stick}_stick", "two numbers [x, y] in 0..1", pair)
        flat[f"{stick}_x"], flat[f"{stick}_y"] = pair
    return _fields(flat, CONTROLLER_FIELDS, where, "controller")


def _projectiles(projectiles: Any, where: str) -> Raw:
    """The first five, in the order of the feed; more are read for mistakes and left out."""
    if not isinstance(projectiles, list):
        raise _wrong(where, "projectiles", "a list of projectiles", projectiles)
    raw: Raw = {}
    for slot, projectile in enumerate(projectiles):
        name = f"projectile.{slot}"
        _object(projectile, PROJECTILE_KEYS, where, name)
        values = _fields(projectile, PROJECTILE_FIELDS, where, name)
        if slot < PROJECTILE_COUNT:
            raw |= values | {f"{name}.exists": 1.0}
    return raw


def _fields(values: Mapping[str, Any], fields: Sequence[Field], where: str, name: str) -> Raw:
    return {f"{name}.{f.name}": _value(values[f.name], f, where, f"{name}.{f.name}") for f in fields}


def _value(value: Any, field: Field, where: str, name: str) -> float:
    if field.kind == "unit":
        return _number(value, where, name, 0, 1)
    if field.kind == "number":
        return _number(value, where, name)
    if not isinstance(value, bool):
        raise _wrong(where, name, "true or false", value)
    return float(value)


def _number(value: Any, where: str, name: str | int, low: float = -NUMBER_LIMIT, high: float = NUMBER_LIMIT) -> float:
    # The exact types, because bool is an int to Python; NaN fails the comparison.
    if type(value) not in (float, int) or not low <= value <= high:
        raise _wrong(where, name, f"a number in {low:g}..{high:g}", value)
    return float(value)


def _id(value: Any, count: int, where: str, name: str | int) -> float:
    number = _number(value, where, name, 0, count - 1)
    if not number.is_integer():
        raise _wrong(where, name, f"a whole number in 0..{count - 1}", value)
    return number


def _stage(value: Any, where: str) -> float:
    if not isinstance(value, str) or value not in STAGES:
        raise _wrong(where, "stage", f"one of {', '.join(STAGES)}", value)
    return float(list(STAGES).index(value))


def _object(value: Any, keys: Sequence[str], where: str, name: str = "") -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(where, name, f"an object with {', '.join(keys)}", value)
    place = f"{where}, field '{name}'" if name else where
    for key in keys:
        if key not in value:
            raise InputError(f"{place}: expected field '{key}', found none")
    for key in value:
        if key not in keys:
            raise InputError(f"{place}: expected only {', '.join(keys)}; found unknown field {_show(key)}")
    return value


def _wrong(where: str, name: str | int, expected: str, found: Any) -> InputError:
    part = f", column {name}" if isinstance(name, int) else f", field '{name}'" if name else ""
    return InputError(f"{where}{part}: expected {expected}, found {_show(found)}")


def _show(value: Any) -> str:
    if isinstance(value, list | dict):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**18:
        return f"a whole number of {value.bit_length()} bits"  # Python refuses to print very long ones
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}..."

"""The policy pipeline: the frame layout against numbers worked out by hand, and refusal of everything that is wrong."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtimes.errors import EngineError, InputError
from runtimes.pipelines.policy import melee
from runtimes.pipelines.policy.melee import BUTTONS, COLUMNS, FRAME_WIDTH, HEADS, ID_COLUMNS
from runtimes.pipelines.policy.pipeline import MAX_FRAMES, PolicyPipeline

pipeline = PolicyPipeline({}, Path("."))
EXAMPLE = pipeline.example()


def encode(*requests: Any) -> np.ndarray:
    return pipeline.encode(requests)["frames"]


def changed(path: str, value: Any) -> dict[str, Any]:
    """The example with the field at a dotted path of its first frame replaced."""
    request = copy.deepcopy(EXAMPLE)
    place = request["frames"][0]
    *folders, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    for key in folders:
        place = place[key]
    place[last] = value
    return request


def one_hot(part: np.ndarray) -> int:
    assert sorted(set(part)) == [0, 1]
    assert part.sum() == 1
    return int(part.argmax())


def test_the_layout_has_the_widths_of_the_specification() -> None:
    widths = [part.stop - part.start for part in COLUMNS.values()]
    assert widths == [56, 56, 7, 13, 112, 4, 35, 2, 2]
    assert (FRAME_WIDTH, ID_COLUMNS, sum(HEADS.values())) == (287, 283, 81)
    assert [part.start for part in COLUMNS.values()] == [0, *np.cumsum(widths)[:-1]]


def test_the_example_is_json_and_two_frames() -> None:
    assert json.loads(json.dumps(EXAMPLE)) == EXAMPLE
    frames = encode(EXAMPLE)
    assert frames.shape == (1, 2, 287)
    assert frames.dtype == np.float32


def test_a_player_is_scaled_as_worked_out_by_hand() -> None:
    player = {
        "percent": 120.0, "facing": False, "x": -34.0, "y": 10.0, "invulnerable": True, "jumps_left": 3,
        "shield_strength": 45.0, "on_ground": False, "speed_air_x_self": 1.0, "speed_ground_x_self": -2.0,
        "speed_y_self": 3.0, "speed_x_attack": -4.0, "speed_y_attack": 0.5, "hitstun_frames_left": 30,
        "action_frame": 15, "stock": 3, "nana": None, "action": 80, "character": 9,
    }  # fmt: skip
    row = encode(changed("opponent", player))[0, 0]
    want = [1.2, -1, -1.7, 0.5, 1, 0.5, 0.45, 0, 0.5, -1, 1.5, -2, 0.25, 0.25, 0.25, 0.75, 51 / 85]
    np.testing.assert_allclose(row[56 : 56 + 17], want, rtol=1e-6)
    assert not row[56 + 17 : 112].any()
    assert list(row[283:]) == [20, 80, 1, 9]


def test_nana_is_scaled_and_classified() -> None:
    nana = {
        "action": 214, "x": 20.0, "y": -10.0, "facing": True, "on_ground": True, "percent": 50.0, "stock": 2,
        "hitstun_frames_left": 99, "action_frame": 30, "invulnerable": False,
    }  # fmt: skip
    row = encode(changed("own.nana", nana))[0, 0]
    part = row[17:56]
    np.testing.assert_allclose(
        part[:10], [1, 1, -0.5, 1, 1, 0.5, 0.5, 0, 0.5, 0], rtol=1e-6
    )  # no hitstun in a dash grab
    assert melee.ACTION_CLASSES[one_hot(part[10:35])] == "grab"
    assert list(part[35:]) == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("action", "name"),
    [(0, "dead"), (14, "idle"), (17, "walk"), (24, "jump_squat"), (40, "crouch"), (69, "attack_air"), (91, "damage"),
     (179, "shield"), (222, "throw"), (236, "dodge"), (253, "ledge"), (342, "special_n"), (357, "special_d"),
     (398, "special_d")],
)  # fmt: skip
def test_actions_fall_in_their_class(action: int, name: str) -> None:
    raw = {"own.nana.exists": np.ones(1), "own.nana.action": np.array([action])}
    assert melee.ACTION_CLASSES[one_hot(melee.encode_frames(raw)[0, 27:52])] == name


def test_values_beyond_the_scale_are_clipped() -> None:
    row = encode(changed("own", EXAMPLE["frames"][0]["own"] | {
        "percent": 900, "x": 5000, "y": -5000, "stock": 9, "action_frame": -1, "jumps_left": 7,
    }))[0, 0]  # fmt: skip
    assert [row[i] for i in (0, 2, 3, 5, 14, 15, 16)] == [5, 10, -10, 1, 0, 1, -10]
    assert row[244] == 1.5
    assert np.abs(row[:ID_COLUMNS]).max() <= melee.SCALED_LIMIT


def test_hitstun_counts_only_in_the_damage_states() -> None:
    for action, want in ((80, 0.5), (14, 0.0)):
        raw = {"own.action": np.array([action]), "own.hitstun_frames_left": np.array([60.0])}
        assert melee.encode_frames(raw)[0, 13] == want


def test_the_rest_of_a_frame_is_as_worked_out_by_hand() -> None:
    row = encode(EXAMPLE)[0, 1]  # own at (-30, 0), opponent at (30, 0), one laser
    np.testing.assert_allclose(row[244:248], [0.3, 0.3, 0, 601 / 28800], rtol=1e-6)
    np.testing.assert_allclose(row[248:255], [1, 1, -0.5, 0.45, 0.54, 3.5, 0], rtol=1e-6)
    assert not row[255:283].any()
    assert one_hot(row[COLUMNS["stage"]]) == 5
    assert one_hot(row[COLUMNS["name"]]) == 0
    assert list(row[COLUMNS["controller"]]) == [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]


def test_a_sixth_projectile_is_left_out_but_still_checked() -> None:
    laser = EXAMPLE["frames"][1]["projectiles"][0]
    full = encode(changed("projectiles", [laser] * 5))
    np.testing.assert_array_equal(encode(changed("projectiles", [laser] * 6)), full)
    with pytest.raises(InputError, match=r"projectile\.5\.x"):
        encode(changed("projectiles", [laser] * 5 + [laser | {"x": None}]))


def test_numbers_say_what_the_objects_they_come_from_say() -> None:
    frames = encode(EXAMPLE)
    numbers = {"frames": [frames[0, 0].tolist(), EXAMPLE["frames"][1]]}
    np.testing.assert_array_equal(encode(numbers, EXAMPLE), np.concatenate([frames, frames]))


def test_ids_are_exact_in_half_precision() -> None:
    row = melee.encode_frames({"own.action": np.arange(399), "own.character": np.arange(399) % 33})
    np.testing.assert_array_equal(row[:, 283].astype(np.float16), np.arange(399))
    np.testing.assert_array_equal(row[:, 285].astype(np.float16), np.arange(399) % 33)


def test_ids_of_a_replay_are_clipped_into_range() -> None:
    row = melee.encode_frames({"own.action": np.array([500]), "own.character": np.array([255])})[0]
    assert (row[283], row[285]) == (398, 32)


@pytest.mark.parametrize("count", [17, 5])
def test_rest_and_the_ends_of_an_axis_survive_the_round_trip(count: int) -> None:
    values = np.array([0.0, 0.5, 1.0])
    np.testing.assert_array_equal(melee.from_bucket(melee.to_bucket(values, count), count), values)
    np.testing.assert_array_equal(melee.to_bucket(melee.from_bucket(np.arange(count), count), count), np.arange(count))


@given(st.floats(0, 1))
def test_a_bucket_is_never_further_than_half_its_width(value: float) -> None:
    for count in (17, 5):
        bucket = melee.to_bucket(value, count)
        assert bucket == math.trunc((count - 1) * value + 0.5)
        assert abs(melee.from_bucket(bucket, count) - value) <= 0.5 / (count - 1)


def test_labels_unpack_to_what_was_packed() -> None:
    rng = np.random.default_rng(0)
    raw = {f"controller.{button}": rng.integers(0, 2, 50) for button in BUTTONS}
    raw |= {f"controller.{axis}": rng.random(50) for axis in (*melee.STICKS, "shoulder")}
    labels = melee.pack_labels(raw)
    assert labels.dtype == np.uint8
    assert labels.shape == (50, 6)
    heads = melee.unpack_labels(labels.reshape(10, 5, 6))
    assert list(heads) == list(HEADS)
    for i, button in enumerate(BUTTONS):
        np.testing.assert_array_equal(heads["buttons"][..., i].ravel(), raw[f"controller.{button}"])
        np.testing.assert_array_equal(labels[:, 0] >> i & 1, raw[f"controller.{button}"])
    for head in (*melee.STICKS, "shoulder"):
        want = [math.trunc((HEADS[head] - 1) * v + 0.5) for v in raw[f"controller.{head}"]]
        np.testing.assert_array_equal(heads[head].ravel(), want)


WRONG = [
    ("frame", "7", r"request 0, frame 0, field 'frame': expected a number .* found '7'"),
    ("frame", True, "found True"),
    ("frame", 10**400, "found a whole number of 1329 bits"),
    ("stage", 32, "expected one of FOUNTAIN_OF_DREAMS"),
    ("name_id", 112, r"expected a number in 0\.\.111"),
    ("own", None, r"field 'own': expected an object with action, character, .* found None"),
    ("own.x", math.nan, r"field 'own\.x': .* found nan"),
    ("own.y", math.inf, r"field 'own\.y': .* found inf"),
    ("own.facing", 1, r"field 'own\.facing': expected true or false, found 1"),
    ("own.action", 399, r"field 'own\.action': expected a number in 0\.\.398, found 399"),
    ("own.action", -1, r"found -1"),
    ("own.action", 14.5, r"expected a whole number in 0\.\.398, found 14\.5"),
    ("opponent.character", 33, r"field 'opponent\.character': expected a number in 0\.\.32, found 33"),
    ("own.nana", {}, r"field 'own\.nana': expected field 'action', found none"),
    ("own.speed", 1, r"unknown field 'speed'"),
    ("controller", [], "expected an object with buttons"),
    ("controller.main_stick", [0.5], "expected two numbers"),
    ("controller.main_stick", [0.5, -1.0], r"field 'controller\.main_y': expected a number in 0\.\.1, found -1\.0"),
    ("controller.buttons.A", 0, r"field 'controller\.A': expected true or false"),
    ("controller.probabilities", {}, "unknown field 'probabilities'"),
    ("projectiles", None, "expected a list of projectiles"),
    ("projectiles", ["x" * 99], r"field 'projectile\.0': expected an object"),
]


@pytest.mark.parametrize(("path", "value", "message"), WRONG)
def test_a_wrong_field_is_named_with_what_was_found(path: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        encode(changed(path, value))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("request 0, frame 0")


@pytest.mark.parametrize("key", ["frame", "stage", "name_id", "own", "opponent", "controller", "projectiles"])
def test_a_missing_field_is_named(key: str) -> None:
    request = copy.deepcopy(EXAMPLE)
    del request["frames"][1][key]
    with pytest.raises(InputError, match=rf"request 1, frame 1: expected field '{key}', found none"):
        encode(EXAMPLE, request)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (None, "request 0: expected an object with frames, found None"),
        ([], "found a list of 0"),
        ({}, "expected field 'frames'"),
        ({"frames": [], "more": 1}, "unknown field 'more'"),
        ({"frames": []}, r"expected a list of 1\.\.512 frames, found a list of 0"),
        ({"frames": [EXAMPLE["frames"][0]] * (MAX_FRAMES + 1)}, "found a list of 513"),
        ({"frames": ["frame"]}, "request 0, frame 0: expected an object with"),
        ({"frames": [[0.0] * 286]}, "request 0, frame 0: expected 287 numbers, found 286"),
        ({"frames": [[0.0] * 286 + ["0"]]}, r"column 286: expected a number in 0\.\.32, found '0'"),
        ({"frames": [[0.0] * 283 + [399, 0, 0, 0]]}, r"column 283: expected a number in 0\.\.398"),
        ({"frames": [[math.nan] + [0.0] * 286]}, r"column 0: expected a number in -10\.\.10, found nan"),
        ({"frames": [[85.0] + [0.0] * 286]}, r"column 0: .* found 85\.0"),
        ({"frames": [[True] + [0.0] * 286]}, r"column 0: .* found True"),
    ],
)
def test_a_wrong_request_is_refused(request_: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        encode(request_)


def test_requests_of_different_lengths_are_refused() -> None:
    short = {"frames": EXAMPLE["frames"][:1]}
    with pytest.raises(InputError, match="request 1: expected 2 frames like request 0, found 1"):
        encode(EXAMPLE, short)
    with pytest.raises(InputError, match="at least one request"):
        encode()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
paths = st.sampled_from(
    ["frame", "stage", "own", "own.x", "own.action", "own.nana", "opponent.facing", "controller", "controller.buttons",
     "controller.buttons.A", "controller.main_stick", "controller.shoulder", "projectiles", "name_id", "extra"]
)  # fmt: skip


def encodes_or_is_refused(request: Any) -> None:
    try:
        frames = encode(request)
    except InputError as refusal:
        lines = str(refusal).splitlines()
    else:
        lines = ["no refusal"]
        assert np.isfinite(frames).all()
        assert (frames[..., ID_COLUMNS:] >= 0).all()
        assert (frames[..., ID_COLUMNS:] < melee.ID_COUNTS).all()
    assert len(lines) == 1


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(json_values | st.fixed_dictionaries({"frames": json_values}))
def test_any_json_is_encoded_or_refused(request: Any) -> None:
    encodes_or_is_refused(request)


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(paths, json_values)
def test_any_field_is_encoded_or_refused(path: str, value: Any) -> None:
    encodes_or_is_refused(changed(path, value))


def logits(batch: int = 2, time: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {head: rng.normal(size=(batch, time, size)).astype(np.float32) for head, size in HEADS.items()}


def test_an_answer_is_the_likeliest_controller_of_the_last_frame() -> None:
    outputs = logits()
    answers = pipeline.decode(outputs)
    assert len(answers) == 2
    assert json.loads(json.dumps(answers)) == answers
    for row, answer in enumerate(answers):
        for i, button in enumerate(BUTTONS):
            assert answer["buttons"][button] == (outputs["buttons"][row, -1, i] > 0)
        sticks = [*answer["main_stick"], *answer["c_stick"]]
        assert sticks == [outputs[axis][row, -1].argmax() / 16 for axis in melee.STICKS]
        assert answer["shoulder"] == outputs["shoulder"][row, -1].argmax() / 4
        for head in HEADS.keys() - {"buttons"}:
            assert sum(answer["probabilities"][head]) == pytest.approx(1)
            assert np.argmax(answer["probabilities"][head]) == outputs[head][row, -1].argmax()


def test_an_answer_can_be_the_controller_of_the_next_frame() -> None:
    answer = pipeline.decode(logits())[0]
    del answer["probabilities"]
    frames = encode(changed("controller", answer))
    np.testing.assert_allclose(frames[0, 0, COLUMNS["controller"]][8:10], 2 * np.array(answer["main_stick"]) - 1)


def test_huge_logits_do_not_overflow() -> None:
    outputs = logits()
    outputs["buttons"][:] = -1e30
    outputs["main_x"][:, :, 16] = 1e30
    with np.errstate(all="raise", under="ignore"):
        answer = pipeline.decode(outputs)[0]
    assert answer["main_stick"][0] == 1.0
    assert not any(answer["buttons"].values())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_engine_error(bad: float) -> None:
    outputs = logits()
    outputs["c_y"][1, -1, 3] = bad
    with pytest.raises(EngineError, match="'c_y'"):
        pipeline.decode(outputs)

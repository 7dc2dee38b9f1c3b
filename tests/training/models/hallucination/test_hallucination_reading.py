"""How the decoder is held: quantised, compiled, spread out, by profile."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtimes.errors import InputError
from runtimes.host.gpu import gpu
from training.config import Config
from training.models.hallucination.frozen import load_decoder
from training.models.hallucination.loading import PROFILES, max_memory, open_decoder, with_profile
from training.models.hallucination.reading import FeatureReader
from training.models.hallucination.settings import CONFIG, TINY
from training.models.hallucination.training import SETTINGS as TRAINING
from training.run import main as run
from training.settings import configure
from training.spec import find_spec

PLAIN: Config = {**TRAINING, "device": "cpu", "seed": 0}
TEXT = json.dumps(
    {"prompt": "The bridge was opened in 1932. It is red.", "answer": "It was opened in 1932. It is blue."}
)
IDS = torch.arange(4, 64)


def features(config: Config = TINY, **settings: Any) -> np.ndarray:
    (entry,) = FeatureReader(config, {**PLAIN, **settings}).run([TEXT])
    return entry[:, 3:]


# Loading -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("loading", "far"), [("fp16", 1e-2), ("bf16", 5e-2), ("int8", 5e-2), ("nf4", 0.5)])
def test_a_smaller_decoder_says_nearly_the_same(loading: str, far: float) -> None:
    pytest.importorskip("bitsandbytes")
    heads = len(TINY["heads"].split())
    exact, near = features()[:, heads:], features(loading=loading)[:, heads:]
    assert 0 < np.abs(near / exact - 1).max() < far


@pytest.mark.slow
def test_quantised_weights_take_the_memory_they_promise() -> None:
    pytest.importorskip("bitsandbytes")
    sizes = {}
    for loading in ("fp32", "int8", "nf4"):
        decoder = open_decoder({**TINY, "base": "seeded:bench"}, {**PLAIN, "loading": loading})
        layers = decoder.model.model.layers
        sizes[loading] = sum(p.numel() * p.element_size() for p in layers.parameters())
    assert sizes["int8"] < 0.27 * sizes["fp32"]
    assert sizes["nf4"] < 0.14 * sizes["fp32"]


@pytest.mark.slow
def test_compiled_layers_say_the_same() -> None:
    np.testing.assert_allclose(features(compile=True), features(), atol=1e-5)


@pytest.mark.slow
def test_layers_that_lie_on_the_disk_say_the_same(tmp_path: Path) -> None:
    load_decoder("seeded:tiny", "main").save_pretrained(tmp_path)
    config = {**TINY, "base": "seeded:tiny"}
    spread = features(config, device_map="auto", max_memory="cpu:300KiB", loading="fp32")
    np.testing.assert_allclose(spread, features(), atol=1e-5)


def test_a_batch_of_answers_is_read_as_each_alone() -> None:
    reader = FeatureReader(TINY, PLAIN)
    other = json.dumps({"prompt": "A much longer prompt about rivers. " * 8, "answer": "They flow."})
    for together, text in zip(reader.run([TEXT, other]), (TEXT, other), strict=True):
        np.testing.assert_allclose(reader.run([text])[0], together, atol=1e-5)
    assert reader.lengths([TEXT, other]) == [len(reader.read(text).ids) for text in (TEXT, other)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loading": "fp8"}, "--set loading: expected one of fp32, .*; found 'fp8'"),
        (
            {"loading": "fp16", "device_map": "auto", "max_memory": "12GiB"},
            "expected pairs such as '0:12GiB cpu:20GiB'",
        ),
        ({"profile": "dgx"}, "--profile: expected one of kaggle-2xt4, .*, auto; found 'dgx'"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(settings: Config, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_decoder(TINY, with_profile({**PLAIN, **settings}, TINY))


# Profiles ------------------------------------------------------------------------------------------------------------


def test_every_profile_sets_what_there_is_to_set() -> None:
    for name, settings in PROFILES.items():
        assert settings.keys() <= TRAINING.keys()
        chosen = with_profile({**PLAIN, "profile": name}, TINY)
        assert chosen == {**PLAIN, **settings}, "and is not looked at again, on another machine"
    assert with_profile(PLAIN, TINY) == PLAIN
    assert max_memory(PROFILES["kaggle-2xt4"]["max_memory"]) == {0: "12GiB", 1: "12GiB"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the order of precisions is that without a GPU")
def test_the_automatic_profile_fits_the_memory_that_is_found() -> None:
    config, auto = {**CONFIG, "base": "seeded:7b"}, {**PLAIN, "profile": "auto"}
    found = [with_profile(auto, config, gib << 30) for gib in (64, 32, 16, 8, 2)]
    assert [settings["loading"] for settings in found] == ["fp32", "bf16", "int8", "nf4", "nf4"]
    assert [bool(settings["device_map"]) for settings in found] == [False, False, False, False, True]
    assert found[0]["padded_size"] > found[3]["padded_size"] >= 512


def test_what_is_set_by_hand_wins_over_a_profile() -> None:
    _, training = configure(find_spec("hallucination"), "tiny", {"profile": "rtx-4090", "loading": "fp32"})
    assert training["loading"] == "fp32"
    assert training["padded_size"] == PROFILES["rtx-4090"]["padded_size"]


@pytest.mark.slow
def test_a_profile_is_used_by_its_name(tmp_path: Path) -> None:
    assert run(["hallucination", "--profile", "auto", "--responses", "30", "--out", str(tmp_path)]) == 0


# A GPU ---------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(gpu() is None, reason="no NVIDIA GPU here")
@pytest.mark.parametrize("loading", ["fp16", "nf4"])
def test_features_on_a_gpu_are_nearly_those_on_the_cpu(loading: str) -> None:
    heads = len(TINY["heads"].split())
    near = features(loading=loading, device="auto", device_map="auto")[:, heads:]
    assert np.abs(near / features()[:, heads:] - 1).max() < 0.5

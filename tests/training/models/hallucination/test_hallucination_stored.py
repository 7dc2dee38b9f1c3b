"""Decoders whose weights are stored as AWQ or GPTQ packed them: read as they are, with `--loading stored`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from export.quantization.language_model import SCHEMES, bytes_of_bf16, quantize
from tests.training.models.hallucination.test_hallucination_data import PROMPT, TOKENIZER
from training.config import Config
from training.models.hallucination.decoder import layer_outputs
from training.models.hallucination.frozen import load_decoder
from training.models.hallucination.loading import is_packed
from training.models.hallucination.reading import FeatureReader
from training.models.hallucination.settings import TINY, resolve_config
from training.models.hallucination.training import SETTINGS as TRAINING

pytestmark = pytest.mark.slow
pytest.importorskip("llmcompressor")
SETTINGS: Config = {**TRAINING, "device": "cpu", "seed": 0}
TEXT = json.dumps({"prompt": PROMPT * 3, "answer": "It was opened in 1932. It is blue."})
FAMILY = "seeded:tiny:qwen2"
HEADS = len(TINY["heads"].split())


def stored(folder: Path, scheme: str) -> Path:
    """A checkpoint of the small Qwen2 in `folder`, with its tokenizer."""
    model = load_decoder.__wrapped__(FAMILY, "main")  # a new one: quantizing changes it
    own = Tokenizer.from_str(TOKENIZER.decode())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    texts = [np.array(own.encode(PROMPT * (i + 1)).ids) for i in range(4)]
    quantize(model, tokenizer, texts, SCHEMES[scheme], folder)
    tokenizer.save_pretrained(folder)
    return folder


def features(base: str, **settings: Any) -> np.ndarray:
    (entry,) = FeatureReader(resolve_config({**TINY, "base": base}), {**SETTINGS, **settings}).run([TEXT])
    return entry[:, 3:]


@pytest.mark.parametrize(("scheme", "far"), [("w4a16_awq", 0.5), ("w4a16_gptq", 0.5), ("w8a16_gptq", 0.05)])
def test_features_are_read_from_packed_weights(tmp_path: Path, scheme: str, far: float) -> None:
    base = str(stored(tmp_path / scheme, scheme))
    assert json.loads((tmp_path / scheme / "config.json").read_text())["quantization_config"]["quant_method"]
    assert bytes_of_bf16(tmp_path / scheme) < 0.65
    plain = tmp_path / "plain"
    load_decoder(FAMILY, "main").save_pretrained(plain)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (plain / name).write_bytes((tmp_path / scheme / name).read_bytes())
    exact, near = features(str(plain))[:, HEADS:], features(base, loading="stored")[:, HEADS:]
    assert 0 < np.abs(near / exact - 1).max() < far
    assert_unpacked_says_the_same(base, near)


def assert_unpacked_says_the_same(base: str, near: np.ndarray) -> None:
    """Against transformers' own way, which unpacks the whole model; and ours is as small afterwards as before."""
    reader = FeatureReader(resolve_config({**TINY, "base": base}), {**SETTINGS, "loading": "stored"})
    layers = reader.detector.base.model.model.layers
    held = [sum(weight.nbytes for weight in layer.parameters()) for layer in layers]
    np.testing.assert_array_equal(reader.run([TEXT])[0][:, 3 + HEADS :], near)
    assert [sum(weight.nbytes for weight in layer.parameters()) for layer in layers] == held
    model = reader.detector.base.model
    model(torch.arange(4, 12)[None])
    reader.detector.base.run_layer = layer_outputs
    assert not any(map(is_packed, model.modules()))
    np.testing.assert_allclose(reader.run([TEXT])[0][:, 3 + HEADS :], near, rtol=1e-5)

"""The benchmark of vLLM: times, memory, quality, and the share of quantized bytes."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from runtimes.bench import vllm as vllm_bench
from runtimes.bench.vllm import quantized_share, row_table
from runtimes.bench.vllm_engines import Load, Round, Row, TransformersEngine, VllmEngine
from runtimes.engines.vllm import VllmRuntime
from runtimes.errors import EngineError, InputError
from runtimes.vllm.artifact import CHECKPOINT
from tests import small_decoders

LOAD = Load(prompts=[[5, 6, 7, 8], [9, 10, 11, 12], [20, 21, 22, 23]], tokens=6)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    small_decoders.make_generator(folder)
    return folder / CHECKPOINT


@pytest.fixture(params=[False, True], ids=["prompt by prompt", "one batch"])
def transformers(decoder: Path, request: pytest.FixtureRequest) -> Iterator[TransformersEngine]:
    with closing(opened(decoder, batched=request.param)) as engine:
        yield engine


def opened(folder: Path, *, batched: bool) -> TransformersEngine:
    return TransformersEngine("transformers", folder, dtype="float32", device="cpu", threads=1, batched=batched)


@pytest.mark.slow
def test_transformers_is_measured_in_a_process_of_its_own(transformers: TransformersEngine) -> None:
    (row,) = vllm_bench.interleaved([transformers], LOAD, rounds=2)
    assert [each.seconds > 0 and each.first_s > 0 for each in row.turns] == [True, True]
    assert row.memory_bytes > 50e6
    assert (row.prompts, row.total) == (3, 18)
    assert row.provider.endswith("cpu float32")


@pytest.mark.slow
def test_a_folder_that_transformers_cannot_open_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="expected an answer of transformers, found its process ended: "):
        opened(tmp_path, batched=False)


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_is_measured_and_its_quality_is_that_of_its_logprobs(vllm_generator: tuple[VllmRuntime, Any]) -> None:
    runtime, module = vllm_generator
    engines = [VllmEngine("vLLM plain", runtime.model), VllmEngine("again", runtime.model)]
    rows = vllm_bench.interleaved(engines, LOAD, rounds=2)
    assert [len(row.turns) for row in rows] == [2, 2]
    assert rows[0].memory_bytes > 500e6  # of the server and its descendants
    texts = [[5, 6, 7, 8, 9], [300, 17]]
    first, again = vllm_bench.qualities(engines, texts)
    with torch.inference_mode():
        losses = [module(torch.tensor([ids])).logits.log_softmax(-1)[0, :-1] for ids in texts]
    own = [
        row[place, ids[place + 1]].item() for row, ids in zip(losses, texts, strict=True) for place in range(len(row))
    ]
    assert first["perplexity"] == pytest.approx(np.exp(-np.mean(own)), rel=1e-4)
    assert (first["tokens"], again["alike"]) == (5, 1)


def test_the_share_of_bytes_includes_scales_and_leaves_out_other_layers(tmp_path: Path) -> None:
    plain, quantized = tmp_path / "plain", tmp_path / "quantized"
    plain.mkdir()
    quantized.mkdir()
    weight = torch.zeros(4, 128, dtype=torch.bfloat16)
    save_file({"a.weight": weight, "head.weight": weight.clone()}, plain / "model.safetensors")
    packed = {"a.weight_packed": torch.zeros(4, 16, dtype=torch.int32), "a.weight_scale": torch.zeros(4, 1)}
    save_file({**packed, "head.weight": weight.clone()}, quantized / "model.safetensors")
    assert quantized_share(plain, quantized) == (4 * 16 * 4 + 4 * 4) / (4 * 128 * 2)
    with pytest.raises(InputError, match="expected packed weights, found none"):
        quantized_share(plain, plain)


def test_too_few_texts_are_refused(decoder: Path, tmp_path: Path) -> None:
    statements = [{"type": "lemma", "text": text} for text in small_decoders.TEXTS]
    data = tmp_path / "valid.jsonl"
    data.write_text(json.dumps({"arxiv_id": "1", "title": "t", "statements": statements}) + "\n")
    arguments = {"data": data, "window": 64, "prompts": [1, 3], "prompt_tokens": 8, "tokens": 4, "texts": 2}
    loads, texts = vllm_bench.read_loads(decoder, SimpleNamespace(**arguments))
    assert [[len(prompt) for prompt in load.prompts] for load in loads] == [[8], [8, 8, 8]]
    assert len(texts) == 2
    with pytest.raises(InputError, match="expected 4 texts of 8 tokens or more, found 3"):
        vllm_bench.read_loads(decoder, SimpleNamespace(**{**arguments, "prompts": [4]}))


def test_the_table_has_medians_and_ratios() -> None:
    turns = [Round(seconds=seconds, cpu_s=0.09, first_s=0.05) for seconds in (1.0, 2.0, 4.0)]
    given = {"provider": "p", "prompts": 3, "total": 18}
    slow = Row(name="transformers", turns=turns, **given)
    quick = Row(name="vLLM plain", turns=[Round(seconds=0.5, cpu_s=0.09, first_s=0.01)], **given)
    other = Row(name="transformers", provider="p", prompts=1, total=6, turns=turns[:1])
    lines = [line.split() for line in row_table([slow, quick, other]).splitlines()[2:]]
    assert lines[0][2:10] == ["9.0", "4.5", "to", "18.0", "1.00", "0.25", "5.0", "50"]
    assert lines[1][3:11] == ["36.0", "36.0", "to", "36.0", "4.00", "1.00", "5.0", "10"]
    assert lines[2][6:8] == ["1.00", "1.00"]

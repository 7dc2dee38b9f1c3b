"""The benchmark of vLLM counts what it says it counts."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small_decoders
import torch
from safetensors.torch import save_file

from runtimes import vllm_bench
from runtimes.engines.vllm import VllmRuntime
from runtimes.errors import EngineError, InputError
from runtimes.vllm_artifact import CHECKPOINT
from runtimes.vllm_bench import Load, Row, TransformersSubject, Turn, VllmSubject, quantized_share, row_table

LOAD = Load(prompts=[[5, 6, 7, 8], [9, 10, 11, 12], [20, 21, 22, 23]], tokens=6)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    small_decoders.make_generator(folder)
    return folder / CHECKPOINT


@pytest.fixture(params=[False, True], ids=["one by one", "one batch"])
def transformers(decoder: Path, request: pytest.FixtureRequest) -> Iterator[TransformersSubject]:
    with closing(opened(decoder, batched=request.param)) as subject:
        yield subject


def opened(folder: Path, *, batched: bool) -> TransformersSubject:
    return TransformersSubject("transformers", folder, dtype="float32", device="cpu", threads=1, batched=batched)


@pytest.mark.slow
def test_transformers_is_measured_in_a_process_of_its_own(transformers: TransformersSubject) -> None:
    transformers.turn(LOAD)
    (turn,) = transformers.row.turns
    assert turn.seconds > 0
    assert turn.first_s > 0
    assert transformers.row.memory_bytes > 50e6
    assert transformers.row.provider.endswith("cpu float32")


@pytest.mark.slow
def test_a_folder_that_transformers_cannot_open_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="expected an answer of transformers, it died and says: "):
        opened(tmp_path, batched=False)


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_is_measured_and_judged_by_what_it_says(vllm_generator: tuple[VllmRuntime, Any]) -> None:
    runtime, module = vllm_generator
    subjects = [VllmSubject("vLLM, plain", runtime.model), VllmSubject("again", runtime.model)]
    vllm_bench.take_turns(subjects, LOAD, rounds=2)
    assert [len(subject.row.turns) for subject in subjects] == [2, 2]
    texts = [[5, 6, 7, 8, 9], [300, 17]]
    vllm_bench.judge(subjects, texts)
    with torch.inference_mode():
        losses = [module(torch.tensor([ids])).logits.log_softmax(-1)[0, :-1] for ids in texts]
    own = [
        row[place, ids[place + 1]].item() for row, ids in zip(losses, texts, strict=True) for place in range(len(row))
    ]
    assert subjects[0].row.perplexity == pytest.approx(np.exp(-np.mean(own)), rel=1e-4)
    assert subjects[1].row.agreement == 1
    assert subjects[0].row.memory_bytes > 500e6  # the server's whole family


def test_the_share_of_bytes_counts_scales_and_leaves_out_what_was_not_quantized(tmp_path: Path) -> None:
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
    asked = {"data": data, "window": 64, "prompts": 3, "prompt_tokens": 8, "tokens": 4, "texts": 2}
    load, texts = vllm_bench.read_load(decoder, SimpleNamespace(**asked))
    assert [len(prompt) for prompt in load.prompts] == [8, 8, 8]
    assert len(texts) == 2
    with pytest.raises(InputError, match="expected 4 texts of 8 tokens or more, found 3"):
        vllm_bench.read_load(decoder, SimpleNamespace(**{**asked, "prompts": 4}))


def test_the_table_has_medians_and_ratios() -> None:
    turns = [Turn(seconds=seconds, cpu_s=0.09, first_s=0.05) for seconds in (1.0, 2.0, 4.0)]
    slow = Row(name="transformers", provider="p", turns=turns)
    quick = Row(name="vLLM, plain", provider="p", turns=[Turn(seconds=0.5, cpu_s=0.09, first_s=0.01)], perplexity=7.25)
    lines = row_table([slow, quick], LOAD).splitlines()
    assert lines[2].split()[1:9] == ["9.0", "4.5", "to", "18.0", "1.00", "0.25", "5.0", "50"]
    assert lines[3].split()[2:] == ["36.0", "36.0", "to", "36.0", "4.00", "1.00", "5.0", "10", "0.00", "7.25", "-", "p"]

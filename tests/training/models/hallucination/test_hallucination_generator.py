"""The detector's generator alone: what it says to every token, and as the language model that others run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from runtimes.errors import InputError
from runtimes.pipelines.hallucination.generator import GeneratorPipeline
from runtimes.tensors import Tensors
from runtimes.vllm.artifact import NEXT_IDS, TOKEN_LOGPROBS
from runtimes.vllm.client import Completion
from training.language_model import check_vocabulary
from training.models.hallucination.frozen import load_decoder
from training.models.hallucination.generator_spec import agreement
from training.random_init import byte_tokenizer
from training.spec import Tolerance, find_spec

SPEC = find_spec("hallucination_generator")
CONFIG = SPEC.preset("tiny")


@pytest.fixture(scope="module")
def module() -> torch.nn.Module:
    return SPEC.interface.part(SPEC.interface.build(CONFIG)).eval()


@pytest.fixture(scope="module")
def sample_inputs() -> Tensors:
    whole = find_spec("hallucination")
    sizes = {**whole.interface.signature(CONFIG).sizes("opt"), "batch": 4}
    return whole.parity.draw_inputs(CONFIG, np.random.default_rng(0), sizes, {})


def inputs(sample_inputs: Tensors, sizes: dict[str, int]) -> Tensors:
    return SPEC.parity.draw_inputs(CONFIG, np.random.default_rng(1), sizes, sample_inputs)


def answer(module: torch.nn.Module, given: Tensors) -> tuple[np.ndarray, ...]:
    with torch.no_grad():
        return tuple(tensor.numpy() for tensor in module(*map(torch.from_numpy, given.values())))


@pytest.mark.parametrize("tokens", [2, 40])
def test_scores_are_those_of_the_model_itself(module: torch.nn.Module, sample_inputs: Tensors, tokens: int) -> None:
    """Row by row, without padding, by Hugging Face's own forward."""
    given = inputs(sample_inputs, {"batch": 3, "tokens": tokens})
    scores, following = answer(module, given)
    model: Any = load_decoder(CONFIG["base"], CONFIG["base_revision"])
    for i, (ids, mask) in enumerate(zip(*given.values(), strict=True)):
        real = torch.from_numpy(ids[mask > 0])
        with torch.no_grad():
            logits = model(input_ids=real[None]).logits[0]
        want = [0.0, *(float(logits[t].log_softmax(-1)[real[t + 1]]) for t in range(len(real) - 1))]
        np.testing.assert_allclose(scores[i, : len(real)], want, atol=1e-4)
        assert following[i, : len(real)].tolist() == logits.argmax(-1).tolist()
        assert not scores[i, len(real) :].any()
        assert not following[i, len(real) :].any()


def test_a_perplexity_is_that_of_all_tokens_but_the_first() -> None:
    pipeline = object.__new__(GeneratorPipeline)
    scores = np.array([[0, -1, -2, 0, 0], [0, -3, -3, -3, -3]], np.float32)
    short, long = pipeline.decode({TOKEN_LOGPROBS: scores, NEXT_IDS: np.zeros((2, 5), np.int64)})
    assert short == {"token_logprobs": [-1, -2], "perplexity": pytest.approx(np.exp(1.5))}
    assert long["perplexity"] == pytest.approx(np.exp(3))


def test_what_is_judged_by_is_not_quantized_on(module: torch.nn.Module, sample_inputs: Tensors) -> None:
    assert SPEC.export.language_model
    seen = SPEC.export.language_model(CONFIG, module, sample_inputs).texts
    held_out = np.concatenate([rows["input_ids"] for rows in SPEC.parity.parity_inputs(CONFIG, sample_inputs)])
    assert (len(seen), len(held_out)) == (2, 2)
    assert all(not np.array_equal(ids[:30], text[:30]) for ids in held_out for text in seen)


def test_the_gate_sees_worse_scores_other_tokens_and_nan() -> None:
    rng, tolerance = np.random.default_rng(0), Tolerance(absolute=1.0, relative=0.2)
    own: Tensors = {
        TOKEN_LOGPROBS: rng.normal(-3, 1, (4, 50)).astype(np.float32),
        NEXT_IDS: rng.integers(0, 260, (4, 50)),
    }
    assert all(check.passed for check in agreement(own, own, tolerance).values())
    worse = agreement({**own, TOKEN_LOGPROBS: own[TOKEN_LOGPROBS] - 0.06}, own, tolerance)
    assert worse["perplexity_ratio"].value == pytest.approx(np.exp(0.06), rel=1e-4)
    assert not worse["perplexity_ratio"].passed
    noisy = agreement({**own, TOKEN_LOGPROBS: own[TOKEN_LOGPROBS] + rng.normal(0, 0.2, (4, 50))}, own, tolerance)
    assert not noisy["mean_shift"].passed
    assert not agreement({**own, NEXT_IDS: own[NEXT_IDS] + 1}, own, tolerance)["next_token"].passed
    broken = {**own, TOKEN_LOGPROBS: np.where(own[TOKEN_LOGPROBS] > -2, np.nan, own[TOKEN_LOGPROBS])}
    assert not any(agreement(broken, own, tolerance)[name].passed for name in ("perplexity_ratio", "mean_shift"))


def test_a_vocabulary_that_does_not_fit_is_refused(module: torch.nn.Module, sample_inputs: Tensors) -> None:
    assert SPEC.export.language_model
    language_model = SPEC.export.language_model(CONFIG, module, sample_inputs)
    smaller = type(language_model.model.config)(vocab_size=200)
    with pytest.raises(InputError, match=r"expected a tokenizer with ids below 200, .* found id 259"):
        check_vocabulary("somewhere", language_model.tokenizer, smaller)


class Writer:
    """A runtime that writes what it was asked for."""

    engine = "writer"

    def complete(self, prompts: list[str], **sampling: Any) -> list[Completion]:
        return [Completion(text=f"{prompt} {sampling}", token_ids=(), finish_reason="length") for prompt in prompts]


@pytest.fixture
def pipeline(tmp_path: Path) -> GeneratorPipeline:
    (tmp_path / "tokenizer.json").write_bytes(byte_tokenizer(single="$A"))
    return GeneratorPipeline({"max_tokens": 16}, tmp_path)


def test_a_request_with_a_length_is_written_on(pipeline: GeneratorPipeline) -> None:
    answers = pipeline.respond(Writer(), [{"text": "a", "max_tokens": 2, "seed": None}])  # type: ignore[arg-type]
    assert answers == [{"text": "a {'temperature': 0, 'max_tokens': 2}", "finish_reason": "length"}]


@pytest.mark.parametrize("request_", [{"text": "a", "max_tokens": 2, "n": 3}, {"max_tokens": 2}])
def test_a_request_to_write_on_says_no_more_than_it_may(pipeline: GeneratorPipeline, request_: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected"):
        pipeline.respond(Writer(), [request_])  # type: ignore[arg-type]


def test_an_engine_that_only_scores_does_not_write(pipeline: GeneratorPipeline) -> None:
    with pytest.raises(InputError, match=r"expected an engine that generates .* found scorer; use --target vllm"):
        pipeline.respond(SimpleNamespace(engine="scorer"), [{"text": "a", "max_tokens": 2}])  # type: ignore[arg-type]

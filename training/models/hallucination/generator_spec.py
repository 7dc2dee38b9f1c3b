"""`hallucination_generator`: the detector's decoder alone, as the language model that wrote the answers.

Nothing here imports torch until it is called.
"""

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from runtimes.artifact import Check
from runtimes.errors import InputError
from runtimes.tensors import Axis, Signature, Tensors, TensorSpec
from runtimes.vllm.artifact import NEXT_IDS, TOKEN_LOGPROBS
from training.config import Config
from training.spec import Export, Parity, Tolerance

if TYPE_CHECKING:
    from torch import nn

    from training.language_model import LanguageModel

INPUTS = ("input_ids", "attention_mask")
SMALLEST_VOCABULARY = (4, 260)  # ids that are neither special nor beyond it
# Limits as shares of the tolerance of a single log-probability in nats: the mean shift of all, the increase of their
# mean, the logarithm of perplexity, and the share of likeliest tokens that may differ.
MEAN_SHARE, WORSE_SHARE, OTHER_SHARE = 0.1, 0.02, 0.25
FEWEST_JUDGED = 100  # tokens


def signature(config: Config) -> Signature:
    """Texts as tokens, padded on the right; the log-probability of each token and the likeliest next token.

    The window has room for one more token, because a generating engine rejects a prompt without it.
    """
    inputs = tuple(TensorSpec(name=name, dtype="int64", shape=("batch", "tokens")) for name in INPUTS)
    outputs = (
        TensorSpec(name=TOKEN_LOGPROBS, dtype="float32", shape=("batch", "tokens")),
        TensorSpec(name=NEXT_IDS, dtype="int64", shape=("batch", "tokens")),
    )
    longest = config["max_tokens"] - 1
    axes = (
        Axis(name="batch", min=1, opt=2, max=config["max_batch"]),
        Axis(name="tokens", min=2, opt=max(2, longest // 3), max=longest),
    )
    return Signature(inputs=inputs, outputs=outputs, axes=axes)


def part(module: "nn.Module") -> "nn.Module":
    from training.models.hallucination.decoder import TokenScores

    return TokenScores(module.base)  # type: ignore[arg-type]


def draw_inputs(config: Config, rng: np.random.Generator, sizes: Mapping[str, int], sample_inputs: Tensors) -> Tensors:
    """Pieces of the sample inputs' texts or made-up ones; the first row is full, the others may be padded."""
    batch, tokens = sizes["batch"], sizes["tokens"]
    ids = rng.integers(*SMALLEST_VOCABULARY, (batch, tokens))
    if "token_ids" in sample_inputs:
        texts = real_texts(sample_inputs)
        ids = np.stack([np.resize(texts[int(rng.integers(len(texts)))], tokens) for _ in range(batch)])
    lengths = rng.integers(2, tokens + 1, batch)
    lengths[0] = tokens
    mask = np.arange(tokens) < lengths[:, None]
    return {"input_ids": np.where(mask, ids, 0).astype(np.int64), "attention_mask": mask.astype(np.int64)}


def real_texts(sample_inputs: Tensors) -> list[np.ndarray]:
    """The sample inputs' prompts and answers without padding: the last of `rows` predicts the last token."""
    ends = sample_inputs["rows"].max(-1) + 2
    return [ids[:end] for ids, end in zip(sample_inputs["token_ids"], ends, strict=True)]


def calibration_texts(sample_inputs: Tensors) -> list[np.ndarray]:
    """The first half of the sample inputs' texts: `parity_inputs` has the others."""
    texts = real_texts(sample_inputs)
    return texts[: max(1, len(texts) // 2)]


def parity_inputs(config: Config, sample_inputs: Tensors) -> Iterator[Tensors]:
    """The second half of the sample inputs' texts, cut to the window."""
    texts = real_texts(sample_inputs)
    held_out = texts[len(texts) // 2 :]
    longest = config["max_tokens"] - 1
    ids = np.zeros((len(held_out), min(longest, max(map(len, held_out)))), np.int64)
    mask = np.zeros_like(ids)
    for i, text in enumerate(held_out):
        ids[i, : len(text)] = text[: ids.shape[1]]
        mask[i, : len(text)] = 1
    for start in range(0, len(ids), config["max_batch"]):
        rows = slice(start, start + config["max_batch"])
        yield {"input_ids": ids[rows], "attention_mask": mask[rows]}


def mask_near_ties(got: Tensors, want: Tensors, tolerance: Tolerance) -> Tensors:
    """The log-probabilities alone: a distance between token ids has no meaning."""
    return {TOKEN_LOGPROBS: got[TOKEN_LOGPROBS]}


def agreement(got: Tensors, want: Tensors, tolerance: Tolerance) -> dict[str, Check]:
    """Perplexity over the original's, the mean shift of a log-probability, the share of equal likeliest tokens.

    No check for fewer than FEWEST_JUDGED tokens.
    """
    predicted = want[TOKEN_LOGPROBS] != 0
    if predicted.sum() < FEWEST_JUDGED:
        return {}
    found, own = (values[TOKEN_LOGPROBS][predicted].astype(np.float64) for values in (got, want))
    same = float((got[NEXT_IDS] == want[NEXT_IDS])[predicted].mean())
    allowed = tolerance.absolute
    return {
        "perplexity_ratio": Check(
            value=float(np.exp((own - found).mean())), limit=float(np.exp(WORSE_SHARE * allowed))
        ),
        "mean_shift": Check(value=float(np.abs(found - own).mean()), limit=MEAN_SHARE * allowed),
        "next_token": Check(value=same, limit=max(0.0, 1 - OTHER_SHARE * allowed), at_least=True),
    }


def language_model(config: Config, module: "nn.Module", sample_inputs: Tensors) -> "LanguageModel":
    """The frozen decoder with its tokenizer; `InputError` if the two do not fit."""
    from training.language_model import LanguageModel, check_vocabulary, complete_tokenizer
    from training.models.hallucination.frozen import template_json, tokenizer_json
    from training.random_init import is_random

    model: Any = module.decoder.model  # type: ignore[union-attr]
    source, revision = config["base"], config["base_revision"]
    tokenizer = complete_tokenizer(tokenizer_json(source, revision), model.config, source, revision)
    if is_random(source):
        around = json.loads(template_json(source, revision))
        tokenizer.chat_template = f"{around['before']}{{{{ messages[-1]['content'] }}}}{around['after']}"
    check_vocabulary(source, tokenizer, model.config)
    texts = calibration_texts(sample_inputs)
    if not texts:
        raise InputError("expected texts to quantize the generator on, found none in its checkpoint; train it again")
    return LanguageModel(model=model, tokenizer=tokenizer, task="generate", window=config["max_tokens"], texts=texts)


PARITY = Parity(
    draw_inputs=draw_inputs,
    parity_inputs=parity_inputs,
    mask_near_ties=mask_near_ties,
    agreement=agreement,
    tolerance={
        "fp32": Tolerance(absolute=2e-2, relative=1e-3),
        "bf16": Tolerance(absolute=0.2, relative=2e-2),
        "w8a16_gptq": Tolerance(absolute=0.2, relative=2e-2),
        "w8a8_gptq": Tolerance(absolute=0.4, relative=5e-2),
        # The tiny preset has random weights, which lose more in quantization. Perplexity: at most 1.05x.
        "w4a16_awq": Tolerance(absolute=2.5, relative=0.2),
        "w4a16_gptq": Tolerance(absolute=2.5, relative=0.2),
        "w3a16_gptq": Tolerance(absolute=3.0, relative=0.3),
    },
)
EXPORT = Export(
    language_model=language_model,
    skips=dict.fromkeys(
        ("onnx", "openvino", "tensorrt", "torch"),
        "the generator is for engines with a key and value cache: export it with --target vllm",
    ),
)

"""The declaration of `statements`. Nothing here imports torch until it is called."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from runtimes.artifact import Check
from runtimes.errors import InputError
from runtimes.tensors import Axis, Signature, Tensors, TensorSpec
from training.agreement import smallest_cosine
from training.config import Config
from training.models.statements.settings import BATCH_MAX, CONFIG, INPUTS, PARITY_ROWS, TINY, TRAINED_ON
from training.spec import Export, Frozen, Interface, ModelSpec, Parity, Tolerance

if TYPE_CHECKING:
    from torch import nn

    from training.language_model import LanguageModel

WHOLE = 2  # statements in the calibration for each shortened one
HALVINGS = 7
NEIGHBOURS = 10
TIE = 1e-6  # similarities no further apart than this name equally good neighbours
VECTOR = "statement_vector"  # no node of a traced graph has this name
POOLINGS = ("last", "mean", "cls")
SMALLEST_VOCABULARY = 258  # bytes and two special tokens
LEAST = {"width": 1, "max_tokens": 4, "lora_rank": 1, "lora_alpha": 1}


def signature(config: Config) -> Signature:
    """Token ids and mask in, padded on either side; unit vectors out."""
    check(config)
    longest = config["max_tokens"]
    return Signature(
        inputs=tuple(TensorSpec(name=name, dtype="int64", shape=("batch", "tokens")) for name in INPUTS),
        outputs=(TensorSpec(name=VECTOR, dtype="float32", shape=("batch", config["width"])),),
        axes=(
            Axis(name="batch", min=1, opt=8, max=BATCH_MAX),
            Axis(name="tokens", min=2, opt=max(2, longest // 2), max=longest),
        ),
    )


def check(config: Config) -> None:
    """`InputError` unless a model of this config can be built."""
    if config["pooling"] not in POOLINGS:
        raise InputError(f"expected pooling of {', '.join(POOLINGS)}; found '{config['pooling']}'")
    for name, least in LEAST.items():
        if config[name] < least:
            raise InputError(f"expected {name} of {least} or more, found {config[name]}")
    if not 0 <= config["lora_dropout"] < 1:
        raise InputError(f"expected a lora_dropout of 0 to below 1, found {config['lora_dropout']}")


def build(config: Config) -> "nn.Module":
    from training.models.statements.module import StatementEmbedder

    check(config)
    return StatementEmbedder(config)


def merged(module: "nn.Module") -> "nn.Module":
    from training.models.statements.module import merged

    return merged(module)


def assets(config: Config) -> Mapping[str, bytes]:
    from training.models.statements.tokenizer import tokenizer_json

    return {"tokenizer.json": tokenizer_json(config["base"], config["base_revision"])}


def frozen(config: Config) -> tuple[Frozen, ...]:
    return (Frozen(prefix="base", source=config["base"], revision=config["base_revision"]),)


def draw_inputs(config: Config, rng: np.random.Generator, sizes: Mapping[str, int], sample_inputs: Tensors) -> Tensors:
    """Real statements or made-up ones; the first row is full, the last padded on the left, the others on the right."""
    batch, tokens = sizes["batch"], sizes["tokens"]
    if "input_ids" in sample_inputs:
        rows = rng.integers(0, len(sample_inputs["input_ids"]), batch)
        real = sample_inputs["attention_mask"].sum(1)[rows]
        ids = np.take_along_axis(sample_inputs["input_ids"][rows], np.arange(tokens) % real[:, None], 1)
    else:
        real = rng.integers(1, tokens + 1, batch)
        ids = rng.integers(2, SMALLEST_VOCABULARY, (batch, tokens))
    lengths = np.minimum(real, tokens)
    lengths[0] = tokens
    mask = np.arange(tokens) < lengths[:, None]
    mask[-1] = mask[-1, ::-1]
    return {"input_ids": np.where(mask, ids, 0).astype(np.int64), "attention_mask": mask.astype(np.int64)}


def calibration(config: Config, sample_inputs: Tensors) -> Iterator[Tensors]:
    """Statements of training papers in single rows without padding, and the beginnings of some, as short as queries.

    A mean over few tokens has larger values than one over many, which the calibration has to cover. An untrained model
    has no training papers; its other sample inputs are used.
    """
    rows = (sample_inputs.get(TRAINED_ON + name, sample_inputs[name]) for name in INPUTS)
    for i, (ids, mask) in enumerate(zip(*rows, strict=True)):
        tokens = int(mask.sum())
        halvings = {0, 1 + i // WHOLE % HALVINGS} if i % WHOLE == 0 else {0}
        for length in (max(2, tokens >> times) for times in sorted(halvings)):  # the least that the axis allows is 2
            yield {"input_ids": ids[None, :length], "attention_mask": mask[None, :length]}


def parity_inputs(config: Config, sample_inputs: Tensors) -> Iterator[Tensors]:
    """The first statements of the sample inputs as they are."""
    for start in range(0, min(PARITY_ROWS, len(sample_inputs["input_ids"])), BATCH_MAX):
        yield {name: sample_inputs[name][start : start + BATCH_MAX] for name in INPUTS}


def agreement(got: Tensors, want: Tensors, tolerance: Tolerance) -> dict[str, Check]:
    """The smallest cosine with the original; for more rows than a batch has, also the agreement of their neighbours.

    top10: the share of the ten nearest that are among the original's ten; order: the share named at the same rank.
    """
    one, other = got[VECTOR].astype(np.float64), want[VECTOR].astype(np.float64)
    cosine = smallest_cosine(one, other)
    checks = {"cosine": Check(value=cosine, limit=1 - 50 * tolerance.absolute**2 - 1e-6, at_least=True)}
    if len(one) > BATCH_MAX:
        top10, order = same_neighbours(one, other)
        checks["top10"] = Check(value=top10, limit=1 - 10 * tolerance.absolute, at_least=True)
        checks["order"] = Check(value=order, limit=1 - 25 * tolerance.absolute, at_least=True)
    return checks


def same_neighbours(got: np.ndarray, want: np.ndarray) -> tuple[float, float]:
    """(overlap of the ten nearest, share of the ten ranks at which the same one is named); ties count as the same."""
    found, own = got @ got.T, want @ want.T
    for scores in (found, own):
        np.fill_diagonal(scores, -np.inf)
    nearest = np.argsort(-found, 1, kind="stable")[:, :NEIGHBOURS]
    picked = np.take_along_axis(own, nearest, 1)  # the original's scores of the candidate's neighbours
    best = -np.sort(-own, 1)[:, :NEIGHBOURS]
    return float((picked >= best[:, -1:] - TIE).mean()), float((np.abs(picked - best) <= TIE).mean())


def language_model(config: Config, module: "nn.Module", sample_inputs: Tensors) -> "LanguageModel":
    from training.models.statements.decoder import language_model

    kind = TRAINED_ON if TRAINED_ON + INPUTS[0] in sample_inputs else ""
    ids, mask = (sample_inputs[kind + name] for name in INPUTS)
    return language_model(config, module, [row[real > 0] for row, real in zip(ids, mask, strict=True)])


SPECS = (
    ModelSpec(
        name="statements",
        pipeline="statements",
        presets={"tiny": TINY, "full": CONFIG},
        interface=Interface(signature=signature, build=build, part=merged, frozen=frozen, assets=assets),
        parity=Parity(
            draw_inputs=draw_inputs,
            parity_inputs=parity_inputs,
            agreement=agreement,
            tolerance={
                "fp32": Tolerance(absolute=2e-6, relative=1e-5),
                "fp16": Tolerance(absolute=1e-3, relative=1e-2),
                "bf16": Tolerance(absolute=4e-3, relative=5e-2),
                "int8": Tolerance(absolute=2e-2, relative=1e-1),
                "w8a16_gptq": Tolerance(absolute=4e-3, relative=5e-2),
                "w8a8_gptq": Tolerance(absolute=2e-2, relative=1e-1),
                "w4a16_awq": Tolerance(absolute=3e-2, relative=1e-1),
                "w4a16_gptq": Tolerance(absolute=3e-2, relative=1e-1),
                "w3a16_gptq": Tolerance(absolute=6e-2, relative=1e-1),
            },
        ),
        export=Export(calibration=calibration, language_model=language_model),
        training_path="training.models.statements.training:TRAINING",
    ),
)

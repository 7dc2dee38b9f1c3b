"""Realistic inputs of `strategy` and its parts for any sizes, from real dialogues where given."""

from collections.abc import Mapping

import numpy as np

from runtimes.pipelines.strategy.dialogue import DISCOURSE, EMOTIONS, OTHER, SEEKER, STRATEGIES
from runtimes.tensors import Tensors
from training.config import Config

BYTE_IDS = (4, 260)  # ids that are neither special nor beyond the smallest vocabulary


def context_inputs(
    config: Config, rng: np.random.Generator, sizes: Mapping[str, int], sample_inputs: Tensors
) -> Tensors:
    """Contexts of the sample inputs as token ids, or made-up ones."""
    return {"token_ids": _ids(rng, (sizes["batch"], sizes["tokens"]), sample_inputs.get("context_ids"))}


def turn_inputs(config: Config, rng: np.random.Generator, sizes: Mapping[str, int], sample_inputs: Tensors) -> Tensors:
    """Turns of the sample inputs as the emotion classifier's token ids, or made-up ones."""
    return {"token_ids": _ids(rng, (sizes["batch"], sizes["tokens"]), sample_inputs.get("newest_turn_ids"))}


def graph_inputs(config: Config, rng: np.random.Generator, sizes: Mapping[str, int], sample_inputs: Tensors) -> Tensors:
    """Sample dialogues, or made-up ones, repeated in time; the first row is full, the others may be padded."""
    batch, turns = sizes["batch"], sizes["turns"]
    rows = rng.integers(0, len(sample_inputs["context"]), batch) if "context" in sample_inputs else None
    contexts = rng.normal(size=(batch, config["context_width"])) if rows is None else sample_inputs["context"][rows]
    lengths = np.append(turns, rng.integers(1, turns + 1, batch - 1))
    real = np.arange(turns) < lengths[:, None]
    logits = rng.normal(size=(batch, turns, len(EMOTIONS))) * 3
    kinds = rng.choice([SEEKER, OTHER], (batch, turns))
    strategies = rng.integers(0, len(STRATEGIES[config["labels"]]) + 1, (batch, turns))
    if rows is not None:
        places = np.arange(turns) % sample_inputs["kinds"].shape[1]
        logits, kinds, strategies = (
            sample_inputs[name][rows[:, None], places] for name in ("emotion_logits", "kinds", "strategies")
        )
        kinds = np.where(kinds == 0, OTHER, kinds)  # turns repeat where the sample dialogue has ended
    return {
        "context": contexts.astype(np.float32),
        "emotion_logits": logits.astype(np.float32),
        "kinds": np.where(real, kinds, 0).astype(np.int64),
        "strategies": strategies.astype(np.int64),
        "relations": _trees(rng, lengths, turns),
    }


def fused_inputs(config: Config, rng: np.random.Generator, sizes: Mapping[str, int], sample_inputs: Tensors) -> Tensors:
    """As the graph's; the emotions of half of the dialogues are known, and with a parser the edges of another half."""
    graph = graph_inputs(config, rng, sizes, sample_inputs)
    known = rng.integers(0, 2, sizes["batch"])[:, None].repeat(sizes["turns"], 1)
    shape = (sizes["batch"], sizes["turns"], sizes["turn_tokens"])
    return {
        "context_ids": _ids(rng, (sizes["batch"], sizes["tokens"]), sample_inputs.get("context_ids")),
        "turn_ids": _ids(rng, shape, sample_inputs.get("newest_turn_ids")),
        "emotion_logits": graph["emotion_logits"],
        "emotion_known": known,
        **{name: graph[name] for name in ("kinds", "strategies", "relations")},
        **(_unparsed(rng, sizes, graph["kinds"], sample_inputs) if config["parser"] == "sddp" else {}),
    }


def parser_inputs(
    config: Config, rng: np.random.Generator, sizes: Mapping[str, int], sample_inputs: Tensors
) -> Tensors:
    """Pairs made of the sample turns, or made-up ones; the first dialogue is full, the others may be shorter."""
    kinds = graph_inputs(config, rng, sizes, {})["kinds"]
    inputs = _unparsed(rng, sizes, kinds, sample_inputs)
    return {name: inputs[name] for name in ("pair_ids", "pair_places")}


def _unparsed(rng: np.random.Generator, sizes: Mapping[str, int], kinds: np.ndarray, sample_inputs: Tensors) -> Tensors:
    """Pairs for the turns of `kinds`; their number is an axis of its own, so a pair may have many places, or none."""
    shape = (sizes["batch"], sizes["pairs"], sizes["pair_tokens"])
    real = kinds > 0
    later = np.triu(np.ones((sizes["turns"], sizes["turns"]), bool)) & real[:, :, None] & real[:, None, :]
    places = rng.integers(0, sizes["pairs"], later.shape)
    return {
        "pair_ids": _ids(rng, shape, sample_inputs.get("newest_turn_ids")),
        "pair_places": np.where(later, places, -1),
        "edges_known": rng.integers(0, 2, sizes["batch"]),
    }


def _ids(rng: np.random.Generator, shape: tuple[int, ...], real: np.ndarray | None) -> np.ndarray:
    """Token ids: pieces of real rows, repeated where they are too short; the last row ends in padding."""
    if real is None:
        ids = rng.integers(*BYTE_IDS, shape)
    else:
        rows = real[rng.integers(0, len(real), shape[:-1])]
        ids = np.take(rows, np.arange(shape[-1]) % rows.shape[-1], -1)
    ids[..., 0] = 0
    ids[-1, ..., -(shape[-1] // 3) or shape[-1] :] = 1
    return ids.astype(np.int64)


def _trees(rng: np.random.Generator, lengths: np.ndarray, turns: int) -> np.ndarray:
    """A discourse tree for every row: each turn but the first answers an earlier one."""
    relations_BTT = np.full((len(lengths), turns, turns), -1, np.int64)
    for relations, length in zip(relations_BTT, lengths, strict=True):
        for tail in range(1, length):
            relations[tail, rng.integers(0, tail)] = rng.integers(len(DISCOURSE))
    return relations_BTT

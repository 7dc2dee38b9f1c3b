"""The discourse of a dialogue: the inputs of the parser, and the tree of its scores.

For training and serving alike. Shapes: B batch, T turns, P pairs of turns.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runtimes.pipelines.strategy.dialogue import ROOT, Dialogue, Turn
from runtimes.tensors import Tensors
from runtimes.text_pipeline import Tokens

PAIR_TOKENS = 96
NO_PAIR = -1e4  # every score of a place without a pair; fits float16
NO_HEAD = "this is the placeholder for start of dialogue"  # before a root, as in the training of the public weights


def pair_tokens(tokenizer_json: bytes) -> Tokens:
    """How pairs become token ids: cut at their ends, as public weights were trained."""
    return Tokens(tokenizer_json, PAIR_TOKENS, keep="first")


def load_pair_tokens(assets: Path) -> Tokens:
    """The same for the tokenizer among an artifact's assets."""
    return Tokens.load(assets / "discourse_tokenizer.json", PAIR_TOKENS, keep="first")


def parser_text(dialogue: Dialogue) -> str:
    """A dialogue as the parser reads it, in one line: its name in a store."""
    return json.dumps([[turn.speaker, turn.text] for turn in dialogue.turns], ensure_ascii=False)


def parser_dialogue(text: str) -> Dialogue:
    """The dialogue of which `text` is the `parser_text`."""
    return Dialogue(turns=tuple(Turn(speaker=speaker, text=printed) for speaker, printed in json.loads(text)))


def pair_tensors(dialogues: Sequence[Dialogue], tokens: Tokens) -> Tensors:
    """The inputs of the parser: every turn after each earlier one, and after none. A dialogue with edges is left out.

    pair_ids     int64 [B, P, tokens]
    pair_places  int64 [B, T, T]: at [head, tail] the pair's row of `pair_ids`, on the diagonal that of no head; or -1
    """
    rows = [[] if dialogue.edges is not None else _pairs(dialogue) for dialogue in dialogues]
    longest, most = max(len(dialogue.turns) for dialogue in dialogues), max(1, *map(len, rows))
    places_BTT = np.full((len(rows), longest, longest), -1, np.int64)
    filled = []
    for row, dialogue, places_TT in zip(rows, dialogues, places_BTT, strict=True):
        if row:
            heads, tails = np.triu_indices(len(dialogue.turns))
            places_TT[heads, tails] = np.arange(len(row))
        filled += [*row, *[("", "")] * (most - len(row))]
    ids = tokens.ids(filled)
    return {"pair_ids": ids.reshape(len(rows), most, -1), "pair_places": places_BTT}


def _pairs(dialogue: Dialogue) -> list[tuple[str, str]]:
    texts = [f"{turn.speaker} , {turn.text}" for turn in dialogue.turns]
    heads, tails = np.triu_indices(len(texts))
    return [(NO_HEAD if head == tail else texts[head], texts[tail]) for head, tail in zip(heads, tails, strict=True)]


def best_trees(scores_BTTC: np.ndarray) -> list[np.ndarray]:
    """The maximum spanning tree of each dialogue's scores at [head, tail], as edges int64 [turns, 3] sorted by tail."""
    turns_B = (np.diagonal(scores_BTTC[..., ROOT], 0, 1, 2) > NO_PAIR).sum(-1)
    return [_best_tree(scores[:turns, :turns]) for scores, turns in zip(scores_BTTC, turns_B, strict=True)]


def _best_tree(scores_TTC: np.ndarray) -> np.ndarray:
    """No turn answers a later one, so that the best head of each turn is independent of the others and makes no cycle.

    The root has one child, as in the parser's own decoding: the first turn, which has no other head.
    """
    turns = len(scores_TTC)
    earlier_TT = np.triu(np.ones((turns, turns), bool), 1)
    heads, tails = np.where(earlier_TT, scores_TTC[..., :ROOT].max(-1), -np.inf).argmax(0), np.arange(turns)
    edges = np.stack([heads + 1, tails + 1, scores_TTC[heads, tails, :ROOT].argmax(-1)], 1)
    edges[0] = (0, 1, ROOT)
    return edges

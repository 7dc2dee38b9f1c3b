"""The structured dialogue discourse parser (Chi & Rudnicky, SIGDIAL 2022): scores of pairs, and the best tree.

Shapes: T turns, N places (T + 1: place 0 is the root), D encoder width, C classes (16 relations and root).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from runtimes.dialogue import DISCOURSE, ROOT
from runtimes.errors import InputError
from runtimes.texts import Tokens
from training.models.strategy.frozen import SEEDED, FrozenModule, inputs, load_encoder, real_tokens

PAIR_TOKENS = 96
CLASSES = len(DISCOURSE) + 1
WEIGHTS = "model.safetensors"
NO_HEAD = "this is the placeholder for start of dialogue"  # what public weights were trained to read before a root
# Of the two bidirectional LSTMs of the public weights only the backward halves are read.
PUBLIC_NAMES = {
    "struct_attention.rnn_b.": "from_diagonal.",
    "struct_attention.rnn_f.": "to_diagonal.",
    "struct_attention.transform_list.0.": "classes.",
}


class DiscourseParser(FrozenModule):
    """Reads every pair of turns, lets the pairs of a row and of a column speak to each other, takes the best tree."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        width: Any = encoder.config.hidden_size  # type: ignore[union-attr]
        self.encoder = encoder
        self.from_diagonal = nn.LSTM(width, width, batch_first=True)
        self.to_diagonal = nn.LSTM(width, width, batch_first=True)
        self.classes = nn.Linear(2 * width, CLASSES)

    def forward(self, pairs_TTD: Tensor) -> Tensor:
        """Scores [T, T, C] at [head, tail]; the diagonal is for the root as head, below it nothing is meant."""
        across_TTD = torch.cat([_rolled(self.from_diagonal, pairs_TTD), _reversed(self.to_diagonal, pairs_TTD)], -1)
        columns_TTD = pairs_TTD.transpose(0, 1)
        down_TTD = torch.cat([self.to_diagonal(columns_TTD)[0], _rolled(self.from_diagonal, columns_TTD, -1)], -1)
        return self.classes(across_TTD + down_TTD.transpose(0, 1))

    def parse(self, turns: Sequence[tuple[str, str]], tokens: Tokens) -> np.ndarray:
        """int64 [T, 3]: (head, tail, relation) for every turn; turns are (speaker, text)."""
        texts = [f"{speaker} , {text}" for speaker, text in turns]
        heads, tails = np.triu_indices(len(texts))
        pairs = [(NO_HEAD if i == j else texts[i], texts[j]) for i, j in zip(heads, tails, strict=True)]
        config: Any = self.encoder.config
        with torch.inference_mode():
            ids = torch.from_numpy(tokens.ids(pairs))
            states = self.encoder(**inputs(self.encoder, ids, real_tokens(ids, config.pad_token_id)))
            pairs_TTD = torch.zeros(len(texts), len(texts), config.hidden_size)
            pairs_TTD[heads, tails] = states.last_hidden_state[:, 0]
            scores_TTC = self(pairs_TTD).double().numpy()
        return decode(scores_TTC)


def _reversed(lstm: nn.LSTM, rows_TTD: Tensor) -> Tensor:
    """What the LSTM says when it reads each row from its end."""
    return lstm(rows_TTD.flip(1))[0].flip(1)


def _rolled(lstm: nn.LSTM, rows_TTD: Tensor, step: int = 1) -> Tensor:
    """What the LSTM says when it reads row i from place i on, to the right or (-1) to the left."""
    turns = len(rows_TTD)
    row = torch.arange(turns)[:, None]
    places = (row + step * torch.arange(turns)) % turns
    result = torch.empty_like(rows_TTD)
    result[row, places] = lstm(rows_TTD[row, places])[0]
    return result


def load_parser(source: str, revision: str) -> DiscourseParser:
    """The parser in a Hugging Face folder with its weights as safetensors, or a seeded one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        parser = DiscourseParser(load_encoder(source, revision))
    if not source.startswith(SEEDED):
        path = Path(source) / WEIGHTS
        if not path.is_file():
            raise InputError(f"expected the parser's weights at {path}, found none; convert them to safetensors")
        own = parser.state_dict()
        stored = {renamed(name): tensor for name, tensor in load_file(path).items()}
        wrong = [name for name in own if name not in stored or own[name].shape != stored[name].shape]
        if wrong:
            raise InputError(f"{path}: expected the parser's parameters, {len(wrong)} do not fit, first '{wrong[0]}'")
        parser.load_state_dict({name: stored[name] for name in own})
    return parser.eval().requires_grad_(False)


def renamed(name: str) -> str:
    """Our name of a parameter of the public weights."""
    for public, own in PUBLIC_NAMES.items():
        if name.startswith(public) and ("_reverse" in name or own == "classes."):
            return own + name.removeprefix(public).replace("_reverse", "")
    return name


def decode(scores_TTC: np.ndarray) -> np.ndarray:
    """The best tree whose root has one child, as edges int64 [T, 3] sorted by tail; a head comes before its tail."""
    turns = len(scores_TTC)
    scores_NN = np.full((turns + 1, turns + 1), -np.inf)
    later = np.triu(np.ones((turns, turns), bool), 1)
    scores_NN[1:, 1:][later] = scores_TTC[..., :ROOT].max(-1)[later]
    scores_NN[0, 1:] = np.diagonal(scores_TTC[..., ROOT])
    heads = best_tree(scores_NN)
    kinds = [int(scores_TTC[head - 1, tail, :ROOT].argmax()) if head else ROOT for tail, head in enumerate(heads[1:])]
    return np.array(list(zip(heads[1:], range(1, turns + 1), kinds, strict=True)), np.int64)


def best_tree(scores_NN: np.ndarray) -> list[int]:
    """The head of every place in the best tree below place 0, which has one child; place 0 has itself.

    Tries every child of the root: of the others, each tree is a maximum spanning arborescence.
    """
    places = len(scores_NN)
    best, best_heads = -np.inf, [0] * places
    for child in range(1, places):
        if not np.isfinite(scores_NN[0, child]):
            continue
        only = scores_NN.copy()
        only[0] = -np.inf
        only[0, child] = scores_NN[0, child]
        heads = arborescence(only)
        total = sum(only[head, tail] for tail, head in enumerate(heads) if tail)
        if total > best:
            best, best_heads = total, heads
    return best_heads


def arborescence(scores_NN: np.ndarray) -> list[int]:
    """The head of every place in the maximum spanning arborescence from place 0 (Chu & Liu 1965, Edmonds 1967)."""
    scores_NN = scores_NN.copy()
    np.fill_diagonal(scores_NN, -np.inf)
    scores_NN[:, 0] = -np.inf
    heads = [0, *scores_NN[:, 1:].argmax(0).tolist()]
    cycle = find_cycle(heads)
    if not cycle:
        return heads
    return _contract(scores_NN, heads, cycle)


def find_cycle(heads: Sequence[int]) -> list[int]:
    """The places of one cycle, or none."""
    for start in range(1, len(heads)):
        path, place = [], start
        while place and place not in path:
            path.append(place)
            place = heads[place]
        if place:
            return path[path.index(place) :]
    return []


def _contract(scores_NN: np.ndarray, heads: list[int], cycle: list[int]) -> list[int]:
    """The arborescence of the graph in which the cycle is one place, with the cycle opened where it is entered."""
    rest = [place for place in range(len(heads)) if place not in cycle]
    inside = np.array([scores_NN[heads[place], place] for place in cycle])
    entering = scores_NN[np.ix_(rest, cycle)] - inside  # what the tree gains by entering at each place
    leaving = scores_NN[np.ix_(cycle, rest)]
    small = np.full((len(rest) + 1, len(rest) + 1), -np.inf)
    small[:-1, :-1] = scores_NN[np.ix_(rest, rest)]
    small[:-1, -1] = entering.max(1)
    small[-1, :-1] = leaving.max(0)
    small_heads = arborescence(small)
    result = list(heads)
    for i, place in enumerate(rest):
        if place:
            head = small_heads[i]
            result[place] = cycle[int(leaving[:, i].argmax())] if head == len(rest) else rest[head]
    outside = small_heads[-1]
    result[cycle[int(entering[outside].argmax())]] = rest[outside]
    return result

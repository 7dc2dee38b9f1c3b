"""The structured dialogue discourse parser (Chi & Rudnicky, SIGDIAL 2022): whom each turn answers, and how.

Shapes: B batch, T turns, P pairs of turns, L tokens, D encoder width, C classes (16 relations and root).
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from runtimes.errors import InputError, one_line
from runtimes.pipelines.strategy.dialogue import DISCOURSE, ROOT
from runtimes.pipelines.strategy.discourse import NO_PAIR
from training.frozen import FrozenModule, freeze, inputs, real_tokens
from training.layers.rnn import run_cell
from training.models.strategy.frozen import load_encoder, load_untrained_encoder
from training.random_init import is_random, with_seed

CLASSES = len(DISCOURSE) + 1
WEIGHTS = "model.safetensors"
# Of the two bidirectional LSTMs of the public weights only the backward halves are read.
PUBLIC_NAMES = {
    "struct_attention.rnn_b.": "from_diagonal.",
    "struct_attention.rnn_f.": "to_diagonal.",
    "struct_attention.transform_list.0.": "classes.",
}
BACKWARD = "_reverse"
UNREAD = ("encoder.pooler.", "encoder.embeddings.position_ids")


class DiscourseParser(FrozenModule):
    """Encodes every pair of turns, and mixes the pairs of a row and of a column by LSTMs."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        width: Any = encoder.config.hidden_size  # type: ignore[union-attr]
        self.encoder = encoder
        self.from_diagonal = nn.LSTM(width, width, batch_first=True)
        self.to_diagonal = nn.LSTM(width, width, batch_first=True)
        self.classes = nn.Linear(2 * width, CLASSES)

    def forward(self, pair_ids: Tensor, pair_places: Tensor) -> Tensor:
        """Scores float32 [B, T, T, C] at [head, tail], for tensors of the pipeline's `pair_tensors`.

        The diagonal has the root as head. Places without a pair, below it and beyond a dialogue's turns, have NO_PAIR.
        """
        ids_RL = pair_ids.flatten(0, 1)
        config: Any = self.encoder.config
        states_RLD = self.encoder(**inputs(self.encoder, ids_RL, real_tokens(ids_RL, config.pad_token_id)))[0]
        vectors_BPD = states_RLD[:, 0].unflatten(0, pair_ids.shape[:2])
        scores_BTTC = self.score(grid(vectors_BPD, pair_places), (pair_places[:, 0] >= 0).sum(-1)).float()
        return torch.where(pair_places.unsqueeze(-1) >= 0, scores_BTTC, NO_PAIR)

    def score(self, pairs_BTTD: Tensor, turns_B: Tensor) -> Tensor:
        """Each pair reads the pairs on both sides of it, along its row and its column."""
        own_BT = torch.arange(pairs_BTTD.shape[1], device=turns_B.device).expand(pairs_BTTD.shape[:2])
        last_BT = (turns_B - 1).unsqueeze(1).expand_as(own_BT)
        columns_BTTD = pairs_BTTD.transpose(1, 2)
        across = read(self.from_diagonal, pairs_BTTD, own_BT, 1), read(self.to_diagonal, pairs_BTTD, last_BT, -1)
        down = (
            read(self.to_diagonal, columns_BTTD, torch.zeros_like(own_BT), 1),
            read(self.from_diagonal, columns_BTTD, own_BT, -1),
        )
        return self.classes(torch.cat(across, -1) + torch.cat(down, -1).transpose(1, 2))


def grid(vectors_BPD: Tensor, places_BTT: Tensor) -> Tensor:
    """The vector of each place [B, T, T, D]; zeros where there is none."""
    chosen_BKP = one_hot(places_BTT.flatten(1), vectors_BPD.shape[1]).to(vectors_BPD.dtype)
    return (chosen_BKP @ vectors_BPD).unflatten(1, places_BTT.shape[1:])


def read(lstm: nn.LSTM, rows_BTTD: Tensor, start_BT: Tensor, step: int) -> Tensor:
    """The LSTM's outputs when it reads each row cyclically from its start, to the right (1) or to the left (-1)."""
    turns = rows_BTTD.shape[2]
    time_T = torch.arange(turns, device=start_BT.device)
    places_RT = start_BT.reshape(-1, 1) + step * time_T
    around_1 = time_T[-1:] + 1  # `turns` as a tensor: the exporter takes no dynamic size for a scalar
    places_RT = torch.where(places_RT < 0, places_RT + around_1, places_RT)
    places_RT = torch.where(places_RT >= around_1, places_RT - around_1, places_RT)
    order_RTT = one_hot(places_RT, turns).to(rows_BTTD.dtype)  # a permutation for each row
    # Time goes first here: torch.export 2.13 cannot show that the smaller of T and T * T is T.
    rows_RTD = rows_BTTD.movedim(2, 0).contiguous().flatten(1, 2).transpose(0, 1)
    read_RTD = order_RTT @ rows_RTD
    state_1RD = read_RTD.new_zeros(1, read_RTD.shape[0], read_RTD.shape[2])
    output_RTD, _ = run_cell(lstm, read_RTD, (state_1RD, state_1RD))
    return (order_RTT.mT @ output_RTD).unflatten(0, rows_BTTD.shape[:2])


def one_hot(ids: Tensor, count: int) -> Tensor:
    """float32 [..., count]; zeros for an id that is none of them."""
    return (ids.unsqueeze(-1) == torch.arange(count, device=ids.device)).float()


def trees(scores_BTTC: Tensor) -> Tensor:
    """`runtimes.pipelines.strategy.discourse.best_trees` as relation ids [B, T, T] at [tail, head], -1 for no edge."""
    best_BTT, relations_BTT = scores_BTTC[..., :ROOT].max(-1)
    turns_T = torch.arange(best_BTT.shape[1], device=best_BTT.device)
    earlier_BTT = (turns_T.unsqueeze(1) < turns_T) & (best_BTT > NO_PAIR)
    heads_B1T = torch.where(earlier_BTT, best_BTT, NO_PAIR).argmax(1, keepdim=True)
    chosen_BTT = earlier_BTT & (turns_T.unsqueeze(1) == heads_B1T)
    return torch.where(chosen_BTT, relations_BTT, -1).transpose(1, 2)


@lru_cache(maxsize=2)
def load_parser(source: str) -> DiscourseParser:
    """The parser in a Hugging Face folder with its weights as safetensors, or a random one; once per process."""
    if is_random(source):
        parser = with_seed(2, lambda: DiscourseParser(load_encoder(source, "main")))
    else:
        parser = DiscourseParser(load_untrained_encoder(source))
        parser.load_state_dict(_stored(Path(source) / WEIGHTS, parser.state_dict()))
    return freeze(parser)


def _stored(path: Path, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in a file under our names; `InputError` unless they are `own`'s, all of them and no others."""
    if not path.is_file():
        raise InputError(f"expected the parser's weights at {path}, found none; convert them to safetensors")
    try:
        stored = {own_name(name): tensor for name, tensor in load_file(path).items() if not _is_unread(name)}
    except SafetensorError as error:
        raise InputError(f"{path}: expected safetensors, found {one_line(error)}") from error
    shapes = {name: list(tensor.shape) for name, tensor in stored.items()}
    expected = {name: list(tensor.shape) for name, tensor in own.items()}
    wrong = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
    if wrong:
        raise InputError(
            f"{path}: expected the parser's parameters, {len(wrong)} do not fit, first '{wrong[0]}': "
            f"expected {expected.get(wrong[0], 'none')}, found {shapes.get(wrong[0], 'none')}"
        )
    return stored


def own_name(name: str) -> str:
    """Our name of a parameter of the public weights."""
    for public, own in PUBLIC_NAMES.items():
        if name.startswith(public):
            return own + name.removeprefix(public).removesuffix(BACKWARD)
    return name


def _is_unread(name: str) -> bool:
    """Whether public weights hold this, and nothing that the parser says depends on it."""
    forward = "struct_attention.rnn_" in name and not name.endswith(BACKWARD)
    return forward or name.startswith(UNREAD)

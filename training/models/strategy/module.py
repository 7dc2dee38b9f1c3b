"""EmoDynamiX: a dialogue as a typed graph of emotions and strategies, read together with its text (Wan et al., 2025).

Shapes: B batch, T turns, N nodes (T + 1: node 0 is the dummy that gathers), E emotions, R relations, L layers,
W graph width, D context width, S strategies, C strategies and none, K vectors of the basis (E + C + 1).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from runtimes.pipelines.strategy.dialogue import (
    DISCOURSE,
    EMOTIONS,
    INTER,
    OTHER,
    PADDING,
    RELATIONS,
    SEEKER,
    SELF,
    STRATEGIES,
)
from training.models.strategy.discourse import load_parser, one_hot, trees
from training.models.strategy.frozen import EmotionClassifier, TextEncoder
from training.models.strategy.rgat import RelationalAttention
from training.models.strategy.settings import LAYERS

TO_TURNS, TO_DUMMY = (
    slice(len(DISCOURSE)),
    slice(SELF, INTER + 1),
)  # relations between turns; to the dummy


class Strategy(nn.Module):
    """The whole model, from texts. `encoder`, `emotion` and an optional `parser` are frozen; `dialogue` is trained."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.encoder = TextEncoder(config["encoder"], config["encoder_revision"], config["pooling"])
        self.emotion = EmotionClassifier(config["emotion_model"], config["emotion_revision"])
        if config["parser"] == "sddp":
            self.parser = load_parser(config["parser_model"])
        self.dialogue = StrategyGraph(config)

    def forward(
        self,
        context_ids: Tensor,
        turn_ids: Tensor,
        emotion_logits: Tensor,
        emotion_known: Tensor,
        kinds: Tensor,
        strategies: Tensor,
        relations: Tensor,
        *unparsed: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `StrategyGraph`; with a parser, `unparsed` has pair ids, their places, and a flag for given edges."""
        classified_BTE = self.emotion(turn_ids.flatten(0, 1)).unflatten(0, turn_ids.shape[:2])
        logits_BTE = torch.where(emotion_known.unsqueeze(-1) > 0, emotion_logits, classified_BTE)
        if unparsed:
            pair_ids, pair_places, edges_known = unparsed
            parsed_BTT = trees(self.parser(pair_ids, pair_places))
            relations = torch.where(edges_known.reshape(-1, 1, 1) > 0, relations, parsed_BTT)
        return self.dialogue(self.encoder(context_ids), logits_BTE, kinds, strategies, relations)


class StrategyGraph(nn.Module):
    """The trained part: context vector, emotion logits and the graph in; strategy logits out."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        count, width = len(STRATEGIES[config["labels"]]), config["hg_dim"]
        self.mixed = config["emotion"] == "mixed"
        # The logarithm: the temperature itself, learned as the paper's code does, crosses zero within a few steps.
        self.log_temperature = nn.Parameter(torch.tensor(config["temperature"]).log())
        self.emotion_prototypes = nn.Parameter(torch.randn(len(EMOTIONS), width))
        self.strategy_embedding = nn.Embedding(count + 1, width)  # the last row: no strategy
        self.dummy = nn.Parameter(torch.randn(width))
        self.layers = nn.ModuleList(RelationalAttention(width, len(RELATIONS)) for _ in range(LAYERS))
        self.classifier = Classifier(width + config["context_width"], count, config["dropout"])

    def forward(
        self, context: Tensor, emotion_logits: Tensor, kinds: Tensor, strategies: Tensor, relations: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [B, S], emotions [B, T, E] with zeros for padding, attention of the dummy over turns [B, L, T])."""
        dummy_B1K, turns_BTK = self.shares(emotion_logits, kinds, strategies).split([1, kinds.shape[1]], 1)
        basis_KW = self.basis()
        to_dummy_BR1T = torch.stack([kinds == OTHER, kinds == SEEKER], 1).unsqueeze(2).float()
        parsed_BRTT = one_hot(relations, len(DISCOURSE)).permute(0, 3, 1, 2)
        first, second, last = self.layers
        # Every node is a mixture of few vectors, whose products with the first layer's matrices export computes ahead.
        gathered_B1W, first_B1T = first(dummy_B1K, turns_BTK, to_dummy_BR1T, TO_DUMMY, basis_KW)
        received_BTW, _ = first(turns_BTK, turns_BTK, parsed_BRTT, TO_TURNS, basis_KW)
        dummy_B1W, turns_BTW = dummy_B1K @ basis_KW + gathered_B1W, turns_BTK @ basis_KW + received_BTW
        gathered_B1W, second_B1T = second(dummy_B1W, turns_BTW, to_dummy_BR1T, TO_DUMMY)
        received_BTW, _ = second(turns_BTW, turns_BTW, parsed_BRTT, TO_TURNS)
        dummy_B1W, turns_BTW = dummy_B1W + gathered_B1W, turns_BTW + received_BTW
        gathered_B1W, last_B1T = last(dummy_B1W, turns_BTW, to_dummy_BR1T, TO_DUMMY)  # turns are not used any more
        logits_BS = self.classify((dummy_B1W + gathered_B1W).squeeze(1), context)
        emotions_BTE = torch.softmax(emotion_logits, -1) * (kinds != PADDING).unsqueeze(-1).float()
        return logits_BS, emotions_BTE, torch.cat([first_B1T, second_B1T, last_B1T], 1)

    def nodes(self, emotion_logits: Tensor, kinds: Tensor, strategies: Tensor) -> Tensor:
        """[B, N, W]: the dummy; the emotion of a seeker's turn, the strategy of any other."""
        return self.shares(emotion_logits, kinds, strategies) @ self.basis()

    def basis(self) -> Tensor:
        """The vectors that nodes are mixtures of, [K, W]: prototypes of emotions, strategies, the dummy."""
        return torch.cat([self.emotion_prototypes, self.strategy_embedding.weight, self.dummy.unsqueeze(0)])

    def shares(self, emotion_logits: Tensor, kinds: Tensor, strategies: Tensor) -> Tensor:
        """How much of each vector of the basis there is in each node, [B, N, K]."""
        is_seeker_BT1 = (kinds == SEEKER).unsqueeze(-1)
        emotion_BTE = torch.where(is_seeker_BT1, self.mixture(emotion_logits), 0.0)
        strategy_BTC = torch.where(is_seeker_BT1, 0.0, one_hot(strategies, self.strategy_embedding.num_embeddings))
        turns_BTK = nn.functional.pad(torch.cat([emotion_BTE, strategy_BTC], -1), (0, 1))
        dummy_K = one_hot(torch.tensor(turns_BTK.shape[-1] - 1, device=kinds.device), turns_BTK.shape[-1])
        shares_BNK = torch.cat([dummy_K.expand(kinds.shape[0], 1, -1), turns_BTK], 1)
        return shares_BNK.to(self.emotion_prototypes.dtype)

    def mixture(self, logits_BTE: Tensor) -> Tensor:
        """The share of each prototype: by a softmax with the learned temperature, or all of the likeliest."""
        if self.mixed:
            return torch.softmax(logits_BTE / self.log_temperature.float().exp(), -1)
        return one_hot(logits_BTE.argmax(-1), len(EMOTIONS))

    def classify(self, gathered_BW: Tensor, context_BD: Tensor) -> Tensor:
        """Logits from the dummy's state and the context."""
        joined_BV = torch.cat([gathered_BW, context_BD.to(gathered_BW.dtype)], -1)
        # In three dimensions: from two ONNX Runtime 1.31 makes a Gemm, which it does not compute in int8.
        return self.classifier(joined_BV.unsqueeze(1)).squeeze(1).float()


class Classifier(nn.Module):
    """One hidden layer of the width of its input."""

    def __init__(self, width: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.out = nn.Linear(width, classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.dropout(torch.tanh(self.dense(self.dropout(x)))))


def typed_edges(kinds_BT: Tensor, relations_BTT: Tensor) -> Tensor:
    """Relation ids [B, N, N] at [tail, head], -1 for no edge: the discourse, and every turn's edge to the dummy."""
    to_dummy_BT = torch.where(kinds_BT == SEEKER, INTER, SELF)
    to_dummy_BT = torch.where(kinds_BT == PADDING, -1, to_dummy_BT)
    nowhere_B1 = torch.full_like(kinds_BT[:, :1], -1)
    first_B1N = torch.cat([nowhere_B1, to_dummy_BT], 1).unsqueeze(1)
    rest_BTN = torch.cat([torch.full_like(relations_BTT[:, :, :1], -1), relations_BTT], 2)
    return torch.cat([first_B1N, rest_BTN], 1)

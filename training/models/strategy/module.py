"""EmoDynamiX: a dialogue as a typed graph of emotions and strategies, read together with its text (Wan et al., 2025).

Shapes: B batch, T turns, N nodes (T + 1: node 0 is the dummy that gathers), E emotions, R relations, L layers,
W graph width, D context width, S strategies.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from runtimes.dialogue import EMOTIONS, INTER, PADDING, RELATIONS, SEEKER, SELF, STRATEGIES
from training.models.strategy.frozen import EmotionClassifier, TextEncoder
from training.models.strategy.rgat import RelationalAttention
from training.models.strategy.spec import LAYERS


class Strategy(nn.Module):
    """The whole: texts in. `encoder` and `emotion` are frozen, `dialogue` is trained."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.encoder = TextEncoder(config["encoder"], config["encoder_revision"], config["pooling"])
        self.emotion = EmotionClassifier(config["emotion_model"], config["emotion_revision"])
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        classified_BTE = self.emotion(turn_ids.flatten(0, 1)).unflatten(0, turn_ids.shape[:2])
        logits_BTE = torch.where(emotion_known.unsqueeze(-1) > 0, emotion_logits, classified_BTE)
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
        nodes_BNW = self.nodes(emotion_logits, kinds, strategies)
        typed_BNN = typed_edges(kinds, relations)
        kinds_R = torch.arange(len(RELATIONS), device=kinds.device).reshape(1, -1, 1, 1)
        edges_BRNN = (typed_BNN.unsqueeze(1) == kinds_R).float()
        attention_L = []
        for layer in self.layers:
            received_BNW, attention_BNN = layer(nodes_BNW, edges_BRNN)
            nodes_BNW = received_BNW + nodes_BNW
            attention_L.append(attention_BNN[:, 0, 1:])
        real_BT1 = (kinds != PADDING).unsqueeze(-1).float()
        emotions_BTE = torch.softmax(emotion_logits, -1) * real_BT1
        return self.classify(nodes_BNW, context), emotions_BTE, torch.stack(attention_L, 1)

    def nodes(self, emotion_logits: Tensor, kinds: Tensor, strategies: Tensor) -> Tensor:
        """[B, N, W]: the dummy; the emotion of a seeker's turn, the strategy of any other."""
        emotion_BTW = self.mixture(emotion_logits).to(self.emotion_prototypes.dtype) @ self.emotion_prototypes
        strategy_BTW = self.strategy_embedding(strategies)
        turns_BTW = torch.where((kinds == SEEKER).unsqueeze(-1), emotion_BTW, strategy_BTW)
        dummy_B1W = self.dummy.expand(kinds.shape[0], 1, -1)
        return torch.cat([dummy_B1W, turns_BTW], 1)

    def mixture(self, logits_BTE: Tensor) -> Tensor:
        """The share of each prototype: by a softmax with the learned temperature, or all of the likeliest."""
        if self.mixed:
            return torch.softmax(logits_BTE / self.log_temperature.float().exp(), -1)
        likeliest_BT1 = logits_BTE.argmax(-1, keepdim=True)
        return (torch.arange(len(EMOTIONS), device=logits_BTE.device) == likeliest_BT1).float()

    def classify(self, nodes_BNW: Tensor, context_BD: Tensor) -> Tensor:
        return self.classifier(torch.cat([nodes_BNW[:, 0], context_BD.to(nodes_BNW.dtype)], -1)).float()


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

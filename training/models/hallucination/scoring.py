"""What a decoder says to every token of a text.

Shapes: B rows, T tokens, V vocabulary.
"""

import torch
from torch import Tensor, nn

from training.models.hallucination.decoder import Decoder


class TokenScores(nn.Module):
    """Token ids and mask int64 [B, T], padded on the right, become (log-probabilities, likeliest next ids) [B, T].

    The log-probability of a token is that after those before it; the first of a row has 0. Padding has 0 and 0.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        for view in self.decoder.layers(input_ids, len(self.decoder.model.model.layers)):
            states_BTD = view.after
        logits_BTV = self.decoder.logits(states_BTD)
        scores_BTV = logits_BTV[:, :-1].log_softmax(-1)
        scores_BT = nn.functional.pad(scores_BTV.gather(-1, input_ids[:, 1:, None]).squeeze(-1), (1, 0))
        real_BT = attention_mask > 0
        return torch.where(real_BT, scores_BT, 0.0), torch.where(real_BT, logits_BTV.argmax(-1), 0)

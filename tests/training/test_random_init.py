"""Frozen and seeded models: alike everywhere, never in training mode, refused in one line."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from runtimes.errors import InputError
from training.frozen import FrozenModule, digest, freeze, stored_tokenizer
from training.random_init import BYTES, byte_tokenizer, geometry, train_tokenizer, with_seed


def test_seeded_weights_are_the_same_and_disturb_no_other_random_numbers() -> None:
    torch.manual_seed(7)
    want = torch.rand(3)
    torch.manual_seed(7)
    one = with_seed(0, lambda: torch.nn.Linear(3, 3))
    assert torch.equal(torch.rand(3), want)
    assert digest(one) == digest(with_seed(0, lambda: torch.nn.Linear(3, 3)))
    assert digest(one) != digest(with_seed(1, lambda: torch.nn.Linear(3, 3)))


def test_what_is_frozen_stays_in_eval_mode_and_has_no_gradients() -> None:
    class Outer(FrozenModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(2, 2)

    module = freeze(Outer()).train()
    assert not module.training
    assert not module.inner.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_every_byte_is_a_token_and_the_text_comes_back() -> None:
    text = "naïve\n\tతెలుగు  🌉"
    tokenizer = Tokenizer.from_buffer(byte_tokenizer(single="<s> $A </s>"))
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(text.encode()) + 2
    assert max(ids) < BYTES
    assert tokenizer.decode(ids) == text


def test_a_trained_tokenizer_puts_its_special_tokens_as_the_template_says(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a ring is a ring"] * 3, 300, ("<pad>", "<end>"), single="$A <end>")
    assert tokenizer.encode("ring").ids[-1] == 1
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert stored_tokenizer(str(tmp_path), "main") == (tmp_path / "tokenizer.json").read_bytes()


def test_an_unknown_geometry_is_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match="expected a geometry of tiny, large behind 'seeded:', found 'huge'"):
        geometry("seeded:huge", {"tiny": {}, "large": {}})

"""The contrastive loss: closed-form gradients, chunks, pieces and processes all give what autograd gives."""

import math
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from runtimes.errors import InputError
from training.models.statements import contrastive
from training.models.statements.contrastive import CachedContrast, cut, info_nce
from training.settings import configure
from training.spec import find_spec

SPEC = find_spec("statements")
TEMPERATURE = 0.07


def dense_loss(x: Tensor, y: Tensor, papers: Tensor) -> Tensor:
    """Symmetric InfoNCE as it is written in the literature, over a whole matrix of scores."""
    scores = x @ y.T / TEMPERATURE
    same = (papers[:, None] == papers) & ~torch.eye(len(x), dtype=torch.bool)
    scores = scores.masked_fill(same, -torch.inf)
    places = torch.arange(len(x))
    return (nn.functional.cross_entropy(scores, places) + nn.functional.cross_entropy(scores.T, places)) / 2


def unit_rows(*shape: int) -> Tensor:
    return nn.functional.normalize(torch.randn(*shape), dim=-1)


@pytest.mark.parametrize("chunk", [3, 256])
@pytest.mark.parametrize("papers", [list(range(10)), [0, 0, 1, 2, 2, 2, 3, 4, 5, 6]], ids=["distinct", "shared"])
def test_loss_and_gradients_in_closed_form_are_those_of_autograd(
    chunk: int, papers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contrastive, "CHUNK", chunk)
    torch.manual_seed(0)
    x, y = unit_rows(10, 16).requires_grad_(), unit_rows(10, 16).requires_grad_()
    want = dense_loss(x, y, torch.tensor(papers))
    want.backward()
    loss, x_gradient, y_gradient = info_nce(x.detach(), y.detach(), torch.tensor(papers), TEMPERATURE)
    torch.testing.assert_close(loss, want.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x_gradient, x.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(y_gradient, y.grad, atol=1e-5, rtol=1e-5)


def test_one_pair_alone_and_pairs_of_one_paper_have_nothing_to_learn() -> None:
    for papers in ([7], [3, 3, 3]):
        x, y = unit_rows(len(papers), 8), unit_rows(len(papers), 8)
        loss, x_gradient, _ = info_nce(x, y, torch.tensor(papers), TEMPERATURE)
        assert loss.item() == pytest.approx(0, abs=1e-6)
        assert x_gradient.abs().max() < 1e-5


class Words(nn.Module):
    """The mean of word vectors, with dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table, self.drop = nn.Embedding(50, 16), nn.Dropout(dropout)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.drop(self.table(ids)) * mask.unsqueeze(-1)
        return nn.functional.normalize(states.sum(1) / mask.sum(1, keepdim=True), dim=-1)


def batch_of(pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 50, (2 * pairs, 9), generator=generator)
    lengths = torch.randint(1, 10, (2 * pairs, 1), generator=generator)
    return ids, (torch.arange(9) < lengths).long(), torch.arange(pairs) // 2


@pytest.mark.parametrize("size", [1, 5, 100])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_pieces_give_the_gradient_of_the_whole_batch_with_the_dropout_that_its_loss_met(
    size: int, dropout: float
) -> None:
    ids, mask, papers = batch_of(8)
    words = Words(dropout).train()
    pieces = cut(ids, mask, size)
    loss = CachedContrast.apply(words, pieces, papers, TEMPERATURE, words.table.weight)
    (3 * loss).backward()
    got, words.table.weight.grad = words.table.weight.grad, None

    vectors = torch.empty(16, 16)
    for piece in pieces:
        torch.manual_seed(piece.seed)
        vectors[piece.rows] = words(piece.ids, piece.mask)
    want = dense_loss(*vectors.chunk(2), papers)
    (3 * want).backward()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(got, words.table.weight.grad, atol=1e-5, rtol=1e-4)


def test_dropout_met_a_second_time_at_random_would_give_another_gradient() -> None:
    ids, mask, papers = batch_of(8)
    words = Words(0.5).train()
    gradients = []
    for reseed in (False, True):
        torch.manual_seed(5)
        pieces = cut(ids, mask, 4)
        loss = CachedContrast.apply(words, pieces, papers, TEMPERATURE, words.table.weight)
        if reseed:
            for piece in pieces:
                object.__setattr__(piece, "seed", piece.seed + 1)
        loss.backward()
        gradients.append(words.table.weight.grad)
        words.table.weight.grad = None
    assert (gradients[0] - gradients[1]).abs().max() > 1e-2


def test_the_random_numbers_of_a_piece_leave_no_trace_outside() -> None:
    ids, mask, papers = batch_of(4)
    words = Words(0.5).train()
    torch.manual_seed(0)
    pieces = cut(ids, mask, 4)
    CachedContrast.apply(words, pieces, papers, TEMPERATURE, words.table.weight)
    found = torch.rand(3)
    torch.manual_seed(0)
    cut(ids, mask, 4)
    torch.testing.assert_close(found, torch.rand(3))


def test_pieces_are_of_like_length_and_hold_no_padding_beyond_their_longest() -> None:
    ids, mask, _ = batch_of(20)
    pieces = cut(ids, mask, 7)
    assert sorted(torch.cat([piece.rows for piece in pieces]).tolist()) == list(range(40))
    for piece in pieces:
        assert piece.ids.shape[1] == mask[piece.rows].sum(1).max()
        torch.testing.assert_close(piece.ids * piece.mask, (ids * mask)[piece.rows, : piece.ids.shape[1]])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_of_a_real_model_has_the_gradient_of_plain_autograd(checkpointing: bool) -> None:
    config, training = configure(SPEC, "tiny", {"papers": "12", "lora_dropout": "0", "micro": "4"})
    recipe = SPEC.training.recipe()(config, training, None)
    torch.manual_seed(0)
    module = SPEC.interface.build(config)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    batch = recipe.datasets(8)[0].__getitems__(range(8))
    with_loss = recipe.module_with_loss(module).train()
    if checkpointing:
        with_loss.gradient_checkpointing_enable()
    with_loss(**batch)["loss"].backward()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    got = {name: parameter.grad for name, parameter in trained.items()}
    module.zero_grad()
    vectors = module(batch["input_ids"], batch["attention_mask"])[0]
    dense_loss(*vectors.chunk(2), batch["labels"]).backward()
    for name, parameter in trained.items():
        torch.testing.assert_close(got[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("name", "value"), [("micro", "0"), ("temperature", "0"), ("quantize", "int2")])
def test_a_setting_that_cannot_be_trained_with_is_refused(name: str, value: str) -> None:
    recipe = SPEC.training.recipe()(*configure(SPEC, "tiny", {name: value}), None)
    with pytest.raises(InputError, match=name):
        recipe.module_with_loss(nn.Identity())


@pytest.mark.slow
def test_two_processes_train_the_model_that_one_trains(tmp_path: Path) -> None:
    """Half the batch each: the same steps over the same pairs, and so the same weights."""
    from safetensors.numpy import load_file

    weights = []
    for processes, batch in ((1, 16), (2, 8)):
        out = tmp_path / str(processes)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
        settings = {"papers": 30, "epochs": 2, "lora_dropout": 0, "batch": batch, "micro": 5, "device": "cpu"}
        changes = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        command = [sys.executable, *torchrun, "-m", "training.run", "statements", "--out", str(out), *changes]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[4])
        assert done.returncode == 0, done.stderr[-2000:]
        weights.append(load_file(out / "statements" / "weights.safetensors"))
    moved = 0.0
    for name, one in weights[0].items():
        np.testing.assert_allclose(weights[1][name], one, atol=2e-4, err_msg=name)
        moved = max(moved, float(np.abs(one).max())) if "lora_B" in name else moved
    assert moved > 1e-3, "two steps that teach nothing would agree, too"
    assert math.isfinite(moved)

"""How an H-Net learns: golden losses, text in pieces, every setting of the guide, and a judge that sees compression."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from runtimes.pipelines.hnet.byte_text import BOS
from training import run
from training.checkpoint import Checkpoint
from training.config import Config
from training.models.hnet.data import Corpus, batch_of
from training.models.hnet.experiments import guide, parameters
from training.models.hnet.losses import (
    alpha_at,
    decays,
    learning_rate_multipliers,
    ratio_loss,
    stage_of,
    stage_ratios,
)
from training.models.hnet.metrics import Tally, measure
from training.models.hnet.ngram import KneserNey, unigram_bits
from training.models.hnet.recipe import HNetRecipe, HNetWithLoss
from training.models.hnet.settings import CONFIG
from training.models.hnet.spec import SPECS
from training.models.hnet.training import NOTES
from training.models.hnet.training import SETTINGS as TRAINING
from training.settings import COMMON

SPEC = SPECS[0]
TINY = SPEC.preset("tiny")
SMALL = ["hnet", "--texts", "40", "--epochs", "1", "--batch", "4", "--max-bytes", "96", "--device", "cpu"]


def settings(**changes: object) -> Config:
    return {**COMMON, **SPEC.training.settings["tiny"], "texts": 40, **changes}


def recipe(config: Config | None = None, **changes: object) -> HNetRecipe:
    return HNetRecipe({**TINY, **(config or {})}, settings(**changes), None)


# Losses


@pytest.mark.parametrize(
    ("chosen", "likely", "ratio", "loss"),
    [
        (1 / 5, 1 / 5, 5, 1.0),
        (0.0, 0.0, 5, 5 / 4),
        (1.0, 1.0, 5, 5.0),
        (1 / 3, 1 / 3, 3, 1.0),
        (0.5, 0.2, 5, 5 / 4 * (4 * 0.1 + 0.4)),
    ],
)
def test_the_ratio_loss_has_the_papers_values(chosen: float, likely: float, ratio: float, loss: float) -> None:
    assert ratio_loss(chosen, likely, ratio) == pytest.approx(loss)


def test_its_gradient_is_zero_just_where_the_wanted_share_is_chosen() -> None:
    """N / (N - 1) * (N F - 1): up where too much is chosen, so that p goes down."""
    for chosen, slope in ((0.2, 0.0), (1.0, 5.0), (0.1, -0.625)):
        likely = torch.tensor(0.4, requires_grad=True)
        ratio_loss(chosen, likely, 5).backward()  # type: ignore[union-attr]
        assert likely.grad is not None
        assert likely.grad.item() == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize(
    ("n_compress", "widths", "multipliers"),
    [
        ([1, 5], [256, 256], [2.145, 0.959]),
        ([1, 5], [256, 512], [3.033, 0.959]),
        ([1, 3, 9], [1024, 1024, 1536], [2.627, 1.517, 0.715]),
    ],
)
def test_stages_learn_at_the_papers_rates(n_compress: list[int], widths: list[int], multipliers: list[float]) -> None:
    assert learning_rate_multipliers(n_compress, widths) == pytest.approx(multipliers, abs=1e-3)


def test_alpha_rises_to_its_value_and_ratios_are_between_stages() -> None:
    assert [alpha_at(epoch, 3.0, 2) for epoch in range(4)] == [1.0, 2.0, 3.0, 3.0]
    assert alpha_at(0, 0.03, 0) == 0.03
    assert stage_ratios([1, 3, 9]) == [3, 3]


def test_groups_have_the_rate_of_their_stage_and_decay_only_where_it_is_due() -> None:
    learned = recipe({"model_dim": "64 128"}, weight_decay=0.1, lr=1e-3)
    module = SPEC.interface.build(learned.config)
    groups = learned.parameter_groups(module)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    seen = Counter(names[id(parameter)] for group in groups for parameter in group["params"])
    assert seen == Counter(names.values())
    outer, inner = learning_rate_multipliers([1, 5], [64, 128])
    for group in groups:
        for name in (names[id(parameter)] for parameter in group["params"]):
            assert group["lr"] == pytest.approx(1e-3 * (inner if "main_network" in name else outer)), name
            plain = any(part in name for part in ("norm", "A_log", "dt_bias", ".D", "bias", "pad_dimension"))
            assert group["weight_decay"] == (0.0 if plain else 0.1), name
    assert {group["lr"] for group in recipe(lr_by_stage=False, lr=1e-3).parameter_groups(module)} == {1e-3}


def test_the_stage_of_a_parameter_is_in_its_name() -> None:
    names = ["embeddings.weight", "backbone.encoder.x", "backbone.main_network.pad_dimension",
             "backbone.main_network.encoder.x", "backbone.main_network.main_network.pad_dimension",
             "backbone.main_network.main_network.main_network.layers.0.x"]  # fmt: skip
    assert [stage_of(name, 2) for name in names] == [0, 0, 1, 1, 2, 2]
    assert stage_of("backbone.main_network.main_network.layers.0.x", 1) == 1
    assert not decays("A_log", torch.nn.Parameter(torch.ones(3)))


# Baselines and the judge


def test_an_ngram_model_is_kneser_ney_with_three_discounts() -> None:
    """Order 2 by dictionaries, and the probabilities of all bytes after each context sum to one."""
    rng = np.random.default_rng(0)
    texts = [bytes(rng.choice(list(b"abcde"), 300, p=[0.4, 0.3, 0.2, 0.05, 0.05])) for _ in range(3)]
    train = Corpus.of(texts)
    model = KneserNey.fit(train, 2)
    pairs = Counter((a, b) for text in texts for a, b in zip([BOS, *text], text, strict=False))
    firsts = Counter(b for _, b in pairs)

    def discounted(counts: Counter) -> dict:  # type: ignore[type-arg]
        n = [max(1, sum(count == k for count in counts.values())) for k in (1, 2, 3, 4)]
        y = n[0] / (n[0] + 2 * n[1])
        steps = [1 - 2 * y * n[1] / n[0], 2 - 3 * y * n[2] / n[1], 3 - 4 * y * n[3] / n[2]]
        held = [min(max(step, 0.05), k - 0.05) for k, step in enumerate(steps, 1)]
        return {key: held[min(count, 3) - 1] for key, count in counts.items()}

    high, low = discounted(pairs), discounted(firsts)

    def probability(context: int, byte: int) -> float:
        total = sum(firsts.values())
        below = (firsts[byte] - low.get(byte, 0)) / total + sum(low.values()) / total / 256
        seen = [b for a, b in pairs if a == context]
        if not seen:
            return below
        count = sum(pairs[context, b] for b in seen)
        left = sum(high[context, b] for b in seen) / count
        return max(0.0, pairs[context, byte] - high.get((context, byte), 0)) / count + left * below

    for context in (BOS, *b"az"):
        assert sum(probability(context, byte) for byte in range(256)) == pytest.approx(1)
    text = b"abzacz\xffe"
    want = [-math.log2(probability(a, b)) for a, b in zip([BOS, *text], text, strict=False)]
    np.testing.assert_allclose(model.bits(Corpus.of([text])), want, rtol=1e-9)


def test_more_context_helps_and_no_baseline_knows_the_future() -> None:
    train, valid = recipe(texts=200).corpora
    bits = [float(KneserNey.fit(train, order).bits(valid).mean()) for order in (1, 3, 5)]
    assert bits[0] > bits[1] > bits[2]
    assert float(unigram_bits(train, valid).mean()) == pytest.approx(bits[0], rel=0.01)
    changed = Corpus(text=valid.text.copy(), offsets=valid.offsets)
    changed.text[50] = 65
    model = KneserNey.fit(train, 5)
    assert (model.bits(changed)[:50] == model.bits(valid)[:50]).all()


def test_the_tally_counts_bytes_code_points_and_boundaries_by_hand() -> None:
    corpus = Corpus.of(["కa".encode()])  # read: BOS E0 B0 95, to be said: E0 B0 95 61
    batch = batch_of(corpus, corpus.pieces(9))
    boundary = torch.tensor([[[1, 1], [1, 0], [1, 1], [0, 0]]]).bool()
    tally = Tally(stages=2)
    tally.add(batch, torch.tensor(8 * math.log(2)), boundary.float() * 0.5, boundary)
    metrics = tally.metrics()
    assert metrics["bits_per_byte"] == pytest.approx(2.0)
    assert (metrics["stage0_F"], metrics["stage1_F"]) == (pytest.approx(3 / 4), pytest.approx(2 / 3))
    assert (metrics["stage0_G"], metrics["stage1_G"]) == (pytest.approx(3 / 8), pytest.approx(1 / 3))
    assert metrics["stage0_bytes_per_chunk"] == pytest.approx(4 / 3)
    assert metrics["stage1_code_points_per_chunk"] == pytest.approx(2 / 2)
    assert metrics["inside_code_point"] == pytest.approx(1 / 3)


def test_judging_in_any_batch_is_the_same() -> None:
    learned = recipe()
    torch.manual_seed(0)
    module, corpus = SPEC.interface.build(learned.config), learned.corpora[1]
    one, many = (measure(module, corpus, corpus.pieces(96), rows).metrics() for rows in (1, 7))
    assert one == pytest.approx(many, rel=1e-4)
    assert module.training


def test_the_judge_sees_compression() -> None:
    """Of two checkpoints the one that predicts a little worse but divides as wanted is the better."""
    judge, loose = recipe(least_code_points=1.5), recipe(least_code_points=0.0)

    def tally(bits: float, chunks: int) -> Tally:
        result = Tally(stages=1, bytes=3000, code_points=1000, nats=3000 * bits * math.log(2))
        result.begun, result.seen = torch.tensor([float(chunks)]), torch.tensor([3000.0])
        return result

    every_byte, as_wanted = tally(1.2, 3000), tally(1.3, 600)
    assert judge.criterion(as_wanted) == pytest.approx(1.3)
    assert judge.criterion(every_byte) > judge.criterion(as_wanted)
    assert loose.criterion(every_byte) < loose.criterion(as_wanted)


# Training


def test_the_loss_is_cross_entropy_and_alpha_times_the_ratio_loss() -> None:
    learned = recipe()
    torch.manual_seed(0)
    module = SPEC.interface.build(learned.config)
    batch = batch_of(learned.corpora[0], learned.corpora[0].pieces(96)[:6], epoch=1)
    logits, p, b = module(batch["byte_ids"], batch["lengths"])
    real = batch["labels"] >= 0
    nats = torch.nn.functional.cross_entropy(logits[real], batch["labels"][real])
    ratio = ratio_loss(b[real].float().mean(), p[real].mean(), 5)
    for alpha, warmup, weight in ((0.5, 0, 0.5), (0.5, 3, 0.25), (0.0, 0, 0.0)):
        changed = settings(alpha=alpha, warmup_compression_epochs=warmup)
        with_loss = HNetWithLoss(module, changed, [1, 5])
        assert with_loss(**batch)["loss"].item() == pytest.approx((nats + weight * ratio).item(), rel=1e-5)


def test_ratio_loss_alone_brings_the_wanted_compression() -> None:
    """With nothing else to learn, alpha moves F towards 1 / N from where it begins."""
    learned = recipe(alpha=5.0)
    torch.manual_seed(0)
    module = SPEC.interface.build(learned.config)
    corpus = learned.corpora[0]
    with_loss, optimizer = HNetWithLoss(module, learned.training, [1, 5]), torch.optim.Adam(module.parameters(), 3e-3)
    for start in range(0, 60, 6):
        with_loss(**batch_of(corpus, corpus.pieces(96)[start % 18 : start % 18 + 6]))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    with_loss.report()
    with_loss(**batch_of(corpus, corpus.pieces(96)[:6]))
    after = with_loss.report()
    assert abs(after["train_F"] - 0.2) < 0.15
    assert after["bytes_per_s"] > 0
    assert with_loss.report() == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["--scheduler", "plateau", "--patience", "1"],
        ["--scheduler", "trapezoid", "--gradient-checkpointing", "true", "--accumulate", "2"],
        ["--model-arch", "m1 m1 T1", "--model-dim", "64 64 64", "--n-compress", "1 3 9", "--align", "utf8"],
        ["--model-arch", "T1", "--model-dim", "64", "--n-compress", "1"],
    ],
)
def test_every_setting_of_the_guide_trains(more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([*SMALL, *more, "--out", str(tmp_path)]) == 0
    checkpoint, told = Checkpoint.load(tmp_path / "hnet"), capsys.readouterr()
    assert checkpoint.metrics["bits_per_byte"] < 9
    assert "bytes_per_s=" in told.err
    assert "eval_bits_per_byte=" in told.err
    assert "5gram" in told.out
    if "--align" in more:
        assert checkpoint.metrics["inside_code_point"] == 0


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model-dim", "64", "a width for each of the 2 stages"),
        ("n-compress", "1", "n_compress: expected 2 numbers"),
        ("alpha", "-1", "alpha: expected 0 or more"),
        ("max-bytes", "2", "max_bytes of 4 or more"),
        ("texts", "1", "2 or more synthetic texts"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(
    name: str, value: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main([*SMALL, f"--{name}", value, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_help_has_every_setting_with_the_guides_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["hnet", "--help"]) == 0
    shown = capsys.readouterr().out
    assert NOTES.keys() <= {*CONFIG, *TRAINING, *COMMON}
    for name in ("PATIENCE", "BATCH_SIZE", "Learning Rate", "Weight Decay", "Scheduler", "alpha", "N_compress",
                 "MODEL_DIM", "MODEL_ARCH", "Warmup for Compression"):  # fmt: skip
        assert name in shown
    assert all(setting in shown for setting in {**CONFIG, **TRAINING, **COMMON})


def test_the_experiments_are_the_guides_and_each_can_be_configured() -> None:
    config, training = run.configure(SPEC, "full", {})
    experiments = guide(config, training)
    assert list(experiments) == ["start of the guide", "patience 10, batch 64", "widths 256 512", "alpha 2", "alpha 5",
                                 "alpha 0.03 (paper)", "transformer T7 256"]  # fmt: skip
    for changes in experiments.values():
        changed, settings_ = run.configure(SPEC, "full", dict(changes))
        HNetRecipe(changed, settings_, None).n_compress  # noqa: B018
    sizes = [parameters(run.configure(SPEC, "full", dict(changes))[0]) for changes in experiments.values()]
    assert sizes[0] == 5_207_136
    assert abs(sizes[-1] / sizes[0] - 1) < 0.08
    with torch.device("meta"):
        assert sizes[-1] == sum(
            p.numel() for p in SPEC.interface.build({**CONFIG, **experiments["transformer T7 256"]}).parameters()
        )

"""ECS and PKS against a literal loop over tokens on Hugging Face's own eager attention, and what is never computed."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from runtimes.errors import InputError
from training.models.hallucination.copying import copying_scores
from training.models.hallucination.decoder import Decoder
from training.models.hallucination.features import divergence
from training.models.hallucination.frozen import decoder_config, load_decoder
from training.models.hallucination.module import ChunkDetector, TokenDetector
from training.models.hallucination.settings import TINY, heads_of, resolve_config
from training.models.hallucination.spec import draw_inputs

FAMILIES = ("llama", "mistral", "qwen2")
SIZES = {"batch": 2, "tokens": 90, "rows": 30, "chunks": 3, "prompt_chunks": 4, "chunk_tokens": 12}
SIZES["prompt_chunk_tokens"] = 15


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def inputs(config: dict[str, Any]) -> dict[str, Tensor]:
    made = draw_inputs(config, np.random.default_rng(1), SIZES, {})
    return {name: torch.from_numpy(values) for name, values in made.items()}


class Dense:
    """One forward of the unchanged model with everything written out: what the paper's formulas are applied to."""

    def __init__(self, source: str, ids: Tensor) -> None:
        model: Any = copy.deepcopy(load_decoder(source, "main"))
        model.set_attn_implementation("eager")
        self.model, self.middle, self.after = model, [], []
        for layer in model.model.layers:
            layer.post_attention_layernorm.register_forward_pre_hook(lambda _, given: self.middle.append(given[0]))
            layer.register_forward_hook(lambda _, given, out: self.after.append(out))
        with torch.no_grad():
            out = model(ids, output_attentions=True, output_hidden_states=True)
        self.attentions, self.final = out.attentions, out.hidden_states[-1]

    def lens(self, states: Tensor) -> Tensor:
        return self.model.lm_head(self.model.model.norm(states))

    def ecs(self, row: int, n: int, layer: int, head: int, first: int, last: int) -> float:
        attention = self.attentions[layer][row, head, n, first:last]
        best = attention.topk(max(1, int(0.1 * (last - first)))).indices + first
        mean = torch.stack([self.final[row, j] for j in best]).mean(0)
        return float(F.cosine_similarity(mean, self.final[row, n], dim=0))

    def pks(self, row: int, n: int, layer: int, variant: str, by_chunk: bool) -> float:
        logs = [F.log_softmax(self.lens(states[layer][row, n]), -1) for states in (self.middle, self.after)]
        mean = (logs[0].exp() + logs[1].exp()) / 2
        if variant == "paper":
            return float(sum(0.5 * (log.exp() * (log - mean.log())).sum() for log in logs))
        kinds = [F.kl_div(log, mean, reduction="none") for log in logs]  # as published: its arguments exchanged
        return float(sum(0.5 * kind.sum() for kind in kinds) if by_chunk else sum(0.5 * k.mean() for k in kinds) * 10e5)


@pytest.mark.parametrize("variant", ["paper", "published"])
def test_token_features_are_those_of_a_literal_loop(family: str, variant: str) -> None:
    config = {**TINY, "level": "token", "base": f"seeded:tiny:{family}", "jsd": variant}
    given = inputs(config)
    detector = TokenDetector(config).eval()
    with torch.no_grad():
        ecs, pks, gaps = detector.by_token(given["token_ids"], given["rows"], given["prompt_range"])
    dense = Dense(config["base"], given["token_ids"])
    scale = 1.0 if variant == "paper" else float(pks.abs().max())
    for row in range(SIZES["batch"]):
        first, last = given["prompt_range"][row].tolist()
        for r, n in enumerate(given["rows"][row].tolist()):
            for i, (layer, head) in enumerate(heads_of(config)):
                if gaps[row, r, i] > 1e-4:
                    assert float(ecs[row, r, i]) == pytest.approx(dense.ecs(row, n, layer, head, first, last), abs=1e-5)
            for layer in range(4):
                assert abs(float(pks[row, r, layer]) - dense.pks(row, n, layer, variant, False)) / scale < 1e-5
    assert float((gaps > 1e-4).float().mean()) > 0.95, "nearly all choices are compared"


@pytest.mark.parametrize(("variant", "total"), [("paper", "mean"), ("published", "sum")])
def test_chunk_features_are_those_of_a_literal_loop(family: str, variant: str, total: str) -> None:
    config = {**TINY, "base": f"seeded:tiny:{family}", "jsd": variant, "chunk_sum": total}
    given = inputs(config)
    detector = ChunkDetector(config).eval()
    with torch.no_grad():
        ecs, pks, *_ = detector(**given)
    dense = Dense(config["base"], given["token_ids"])
    join = torch.mean if total == "mean" else torch.sum
    for row, chunk in ((row, c) for row in range(2) for c in range(SIZES["chunks"] - 1)):
        start, end = given["row_spans"][row, chunk].tolist()
        places = given["rows"][row, start:end].tolist()
        with torch.no_grad():
            own = detector.encoder(given["chunk_ids"][row, chunk : chunk + 1])[0]
            others = detector.encoder(given["prompt_chunk_ids"][row])
        for i, (layer, head) in enumerate(heads_of(config)):
            attention = dense.attentions[layer][row, head][places]
            weights = [join(attention[:, s:e]) for s, e in given["prompt_spans"][row].tolist()]
            best = int(torch.stack(weights).argmax())
            assert float(ecs[row, chunk, i]) == pytest.approx(float(own @ others[best]), abs=1e-5)
        for layer in range(4):
            want = [dense.pks(row, n, layer, variant, True) for n in places]
            got = float(pks[row, chunk, layer])
            assert got == pytest.approx(sum(want) / (len(want) if total == "mean" else 1), rel=1e-4, abs=1e-5)
    assert float(ecs[:, -1].abs().max()) == float(pks[:, -1].abs().max()) == 0, "the padded chunk"


def test_the_divergence_is_bounded_symmetric_and_zero_for_equals() -> None:
    torch.manual_seed(0)
    p, q = (torch.randn(50, 300) * scale for scale in (1, 100))
    found = divergence(p, q, "paper", True)
    assert float(found.min()) >= 0
    assert float(found.max()) <= math.log(2) + 1e-6
    torch.testing.assert_close(found, divergence(q, p, "paper", True))
    assert float(divergence(p, p, "paper", True).abs().max()) < 1e-7, "not even floating-point noise"
    apart = torch.tensor([[0.0, -200, -200, -200], [-200, 0, -200, -200]])  # with probabilities that are 0
    assert float(divergence(apart[0], apart[1], "paper", True)) == pytest.approx(math.log(2))


def test_blocks_of_rows_give_what_all_rows_at_once_give(monkeypatch: pytest.MonkeyPatch) -> None:
    from training.models.hallucination import features

    for config in (TINY, {**TINY, "level": "token"}):
        given = inputs(config)
        detector = (ChunkDetector if config["level"] == "chunk" else TokenDetector)(config).eval()
        answers = []
        for numbers in (1 << 30, 1):  # all rows, and one at a time
            monkeypatch.setattr(features, "BLOCK_NUMBERS", numbers)
            with torch.no_grad():
                answers.append(detector(**given)[:4])
        for whole, pieces in zip(*answers, strict=True):
            torch.testing.assert_close(whole, pieces, atol=1e-5, rtol=1e-5)


def test_what_follows_the_answer_changes_nothing() -> None:
    given = inputs(TINY)
    detector = ChunkDetector(TINY).eval()
    longer = {**given, "token_ids": F.pad(given["token_ids"], (0, 40), value=9)}
    with torch.no_grad():
        for one, other in zip(detector(**given), detector(**longer), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


class Largest(TorchDispatchMode):
    """The most numbers that any one result of an operation held."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.mark.parametrize("level", ["chunk", "token"])
def test_no_result_grows_with_the_square_of_the_prompt(level: str) -> None:
    config = {**TINY, "level": level, "max_tokens": 4096}
    kind = ChunkDetector if level == "chunk" else TokenDetector
    detector, largest = kind(config).eval(), []
    for tokens in (1024, 4096):
        sizes = {**SIZES, "batch": 1, "tokens": tokens}
        given = {
            name: torch.from_numpy(values)
            for name, values in draw_inputs(config, np.random.default_rng(0), sizes, {}).items()
        }
        with torch.no_grad(), Largest() as seen:
            detector(**given)
        largest.append(seen.numbers)
    assert largest[1] <= 4.1 * largest[0]
    assert largest[1] < 4096 * 4096 / 8


def test_layers_above_the_last_that_is_read_do_not_run() -> None:
    config = {**TINY, "heads": "0.1 1.2", "layers": "0"}
    detector = ChunkDetector(config).eval()
    ran: list[int] = []

    def seen(layer: Any, *rest: Any) -> Any:
        ran.append(next(i for i, own in enumerate(detector.base.model.model.layers) if own is layer))
        return run_layer(layer, *rest)

    run_layer, detector.base.run_layer = detector.base.run_layer, seen
    with torch.no_grad():
        detector(**inputs(config))
    assert ran == [0, 1]


def test_half_precision_keeps_the_rotary_frequencies_and_the_scorer_exact() -> None:
    detector = copy.deepcopy(ChunkDetector(TINY)).half()
    assert detector.base.frequencies == ChunkDetector(TINY).base.frequencies
    assert detector.scorer.mix.dtype == torch.float32
    assert float(detector.scorer.mix[0, 1]) == pytest.approx(0.6, abs=1e-7)
    assert detector.base.model.lm_head.weight.dtype == torch.float16


def test_copying_heads_are_found_by_their_circuits() -> None:
    """Against the matrix of the vocabulary by the vocabulary, written out."""
    source = "seeded:tiny:qwen2"
    model: Any = load_decoder(source, "main")
    found = copying_scores(Decoder(source, "main"))
    embed, out = model.model.embed_tokens.weight.double(), model.lm_head.weight.double()
    for layer, head in ((0, 0), (2, 3)):
        attention = model.model.layers[layer].self_attn
        width = attention.head_dim
        values = attention.v_proj.weight.double()[(head // 2) * width : (head // 2 + 1) * width]
        circuit = out @ attention.o_proj.weight.double()[:, head * width : (head + 1) * width] @ values @ embed.T
        assert found.traces[layer, head] == pytest.approx(float(circuit.trace()), rel=1e-4)
        radii = circuit.abs().sum(1) - circuit.diagonal().abs()
        low, high = np.quantile(radii.detach().numpy(), [0.25, 0.75])
        outliers = int(((radii < low - 1.5 * (high - low)) | (radii > high + 1.5 * (high - low))).sum())
        assert abs(found.outliers[layer, head] - outliers) <= 1
    assert len(found.best(5)) == 5
    assert len(set(found.best(16))) == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "seeded:huge"}, "expected seeded:GEOMETRY"),
        ({"base": "/nowhere/model"}, "expected a Hugging Face folder or hub id, found '/nowhere/model'"),
        ({"heads": "40.1"}, r"expected heads and layers of its 4 layers of 4 heads, found head \(40, 1\)"),
        ({"layers": "7"}, "found layer 7"),
        ({"heads": "one"}, "expected heads such as '25.0 18.13', or all; found 'one'"),
        ({"layers": ""}, "expected layers such as '23 24', or all; found ''"),
        ({"level": "word"}, "expected level of chunk, token; found 'word'"),
        ({"max_tokens": 100_000}, "expected max_tokens up to 16384, found 100000"),
        ({"chunk_tokens": 600}, "seeded:tiny: expected chunk_tokens up to 512, found 600"),
        ({"top_percent": 60}, "expected top_percent up to 50"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_config({**TINY, **changes})


def test_all_heads_and_layers_are_those_of_the_base() -> None:
    named = resolve_config({**TINY, "heads": "all", "layers": "all"})
    assert (named["heads"], named["layers"]) == (TINY["heads"], TINY["layers"])


def test_another_family_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"expected a decoder of llama, mistral, qwen2 .* found 'gpt2'"):
        decoder_config(str(tmp_path), "main")

"""The embedder: pooling, adapters, what a checkpoint holds, metrics; each against an independent reference."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from benchmarks.statements.padding import main as padding_bench
from runtimes.errors import ArtifactError, InputError
from runtimes.text_pipeline import Tokens
from training.checkpoint import Checkpoint, restore
from training.models.statements import base, metrics, tokenizer
from training.models.statements.make_base import main as make_base
from training.models.statements.module import StatementEmbedder, adapted_layers, merged
from training.run import main as run
from training.spec import find_spec

SPEC = find_spec("statements")
TINY = SPEC.preset("tiny")


def embedder(**changes: Any) -> nn.Module:
    """A tiny embedder whose adapters say something."""
    torch.manual_seed(0)
    module = SPEC.interface.build({**TINY, **changes}).eval()
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return module


def tokens(rows: int = 3, length: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 500, (rows, length), generator=generator)
    return ids, torch.ones_like(ids)


@pytest.mark.parametrize(("geometry", "count"), [("7b", 12_388_352), ("1.5b", 5_326_848)])
def test_so_many_parameters_are_trained(geometry: str, count: int) -> None:
    with torch.device("meta"):
        module = StatementEmbedder({**TINY, "base": f"seeded:{geometry}", "width": 2048})
    assert sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad) == count


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(pooling: str) -> None:
    module = embedder(pooling=pooling)
    ids, mask = tokens()
    (want,) = module(ids, mask)
    padding = torch.zeros(3, 5, dtype=torch.int64)
    for order in (slice(None), slice(None, None, -1)):
        row = [torch.cat([each, padding][order], 1) for each in (ids, mask)]
        torch.testing.assert_close(module(*row)[0], want, atol=1e-6, rtol=0)
    both = [torch.cat([padding, each, padding], 1) for each in (ids, mask)]
    torch.testing.assert_close(module(*both)[0], want, atol=1e-6, rtol=0)


@torch.no_grad()
def test_half_precision_with_padding_on_the_left_is_finite_and_right() -> None:
    module = embedder()
    ids, mask = tokens()
    (want,) = module(ids, mask)
    padding = torch.zeros(3, 40, dtype=torch.int64)
    (got,) = module.half()(torch.cat([padding, ids], 1), torch.cat([padding, mask], 1))
    assert ((got * want).sum(1) > 0.9999).all()


@torch.no_grad()
def test_the_vector_is_the_projected_state_of_the_last_token_as_transformers_gives_it() -> None:
    module = embedder(pooling="last")
    ids, mask = tokens()
    mask[1, 6:] = 0
    found = module(ids, mask)[0]
    for row, length in enumerate((9, 6, 9)):
        state = module.base(input_ids=ids[row : row + 1, :length]).last_hidden_state[0, -1]
        want = nn.functional.normalize(module.projection(state), dim=-1)
        torch.testing.assert_close(found[row], want, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))


@torch.no_grad()
def test_merged_adapters_are_the_formula_and_leave_no_adapter() -> None:
    module = embedder()
    ids, mask = tokens()
    (want,) = module(ids, mask)
    layer = module.base.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weight = layer.base_layer.weight + 16 / 8 * b @ a
    assert len(list(adapted_layers(module))) == 8
    merged(module)
    torch.testing.assert_close(module.base.layers[0].self_attn.q_proj.weight, weight)
    assert not list(adapted_layers(module))
    torch.testing.assert_close(module(ids, mask)[0], want, atol=1e-5, rtol=0)


def saved_base(folder: Path, model: Any) -> str:
    """A Hugging Face folder with this model and the tokenizer of the seeded base."""
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer.tokenizer_json("seeded:tiny", "main"))
    return str(folder)


def small_bert() -> BertModel:
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertModel(BertConfig(vocab_size=1024, **sizes))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@torch.no_grad()
def test_an_encoder_can_be_the_base(pooling: str, tmp_path: Path) -> None:
    model = small_bert().eval()
    folder = saved_base(tmp_path / "bert", model)
    module = SPEC.interface.build(
        {**TINY, "base": folder, "pooling": pooling, "lora_targets": "query,key,value"}
    ).eval()
    ids, mask = tokens()
    mask[0, 5:] = 0
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    pooled = states[:, 0] if pooling == "cls" else (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    want = nn.functional.normalize(module.projection(pooled), dim=-1)
    torch.testing.assert_close(module(ids, mask)[0], want, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@torch.no_grad()
def test_a_decoder_with_absolute_positions_counts_them_from_the_first_real_token(tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = GPT2Model(GPT2Config(vocab_size=1024, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()
    folder = saved_base(tmp_path / "gpt2", model)
    targets = {"lora_targets": "c_attn"}
    module = SPEC.interface.build({**TINY, "base": folder, "pooling": "last", **targets}).eval()
    ids, mask = tokens()
    want = nn.functional.normalize(module.projection(model(input_ids=ids).last_hidden_state[:, -1]), dim=-1)
    padding = torch.zeros(3, 5, dtype=torch.int64)
    (got,) = module(torch.cat([padding, ids], 1), torch.cat([padding, mask], 1))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_adapters_for_layers_that_a_base_does_not_have_are_refused_with_those_it_has(tmp_path: Path) -> None:
    folder = saved_base(tmp_path / "bert", small_bert())
    with pytest.raises(InputError, match=r"expected .* q_proj.*found dense, key, query, value.*--lora_targets"):
        SPEC.interface.build({**TINY, "base": folder})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"pooling": "max"}, "last, mean, cls"),
        ({"lora_rank": 0}, "lora_rank"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"max_tokens": 2}, "max_tokens"),
        ({"base": "seeded:9b"}, "1.5b"),
        ({"base": "no/such/folder/here"}, "Hugging Face"),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_one_line(change: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named) as caught:
        SPEC.interface.build({**TINY, **change})
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint over a base in a folder of its own."""
    folder = tmp_path_factory.mktemp("statements")
    lines = [{"lemmas": [f"Let $x_{i}$ be {w}." for w in ("odd", "even", "prime")]} for i in range(12)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["--data", str(folder / "data.jsonl"), "--out", str(folder / "base")]
    assert make_base([*arguments, "--width", "32", "--vocabulary", "300"]) == 0
    arguments = ["--data", str(folder / "data.jsonl"), "--out", str(folder), "--batch", "4"]
    assert run(["statements", *arguments, "--base", str(folder / "base"), "--epochs", "2"]) == 0
    return folder


def test_a_base_has_the_sizes_it_is_asked_for_and_length_buckets_are_measured_over_it(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = str(trained / "data.jsonl"), trained / "tiny base"
    assert make_base(["--data", data, "--out", str(out), "--geometry", "tiny", "--vocabulary", "300"]) == 0
    sizes = json.loads((out / "config.json").read_text())
    wanted = {name: size for name, size in base.GEOMETRIES["tiny"].items() if name != "vocab_size"}
    assert {name: sizes[name] for name in wanted} == wanted
    capsys.readouterr()
    assert padding_bench(["--base", str(out), "--data", data, "--statements", "36", "--rounds", "1"]) == 0
    tokens = Tokens.load(out / "tokenizer.json", 256)
    lengths = tokens.lengths([f"Let $x_{i}$ be {w}." for i in range(12) for w in ("odd", "even", "prime")])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("length buckets")]
    assert line.split()[2] == str(36 * max(lengths)), "all of them are one batch"
    assert padding_bench(["--data", data]) == 2


def test_a_checkpoint_holds_adapters_and_projection_and_names_every_tensor_of_the_base(trained: Path) -> None:
    checkpoint = Checkpoint.load(trained / "statements")
    names = set(load_file(checkpoint.folder / "weights.safetensors"))
    assert {name.partition(".")[0] for name in names} == {"adapters", "projection"}
    assert "adapters.layers.0.self_attn.k_proj.lora_A.weight" in names
    files = load_file(trained / "base" / "model.safetensors")
    assert set(checkpoint.frozen["base"]["tensors"]) == {f"base.{name}" for name in files}


def test_a_restored_model_says_what_the_trained_one_said(trained: Path) -> None:
    checkpoint = Checkpoint.load(trained / "statements")
    weights = load_file(checkpoint.folder / "weights.safetensors")
    module = SPEC.interface.build(checkpoint.config).eval()
    module.load_state_dict(weights, strict=False)
    assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)
    ids, mask = (torch.from_numpy(checkpoint.sample_inputs()[name]) for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        torch.testing.assert_close(restore(checkpoint, SPEC)(ids, mask)[0], module(ids, mask)[0], atol=1e-6, rtol=0)


def test_another_base_of_the_same_shape_is_refused(trained: Path, tmp_path: Path) -> None:
    """The public project trains over one 1.5B model and serves over another: the shapes fit."""
    other = tmp_path / "trained"
    shutil.copytree(trained, other)
    file = trained / "base" / "model.safetensors"
    original = file.read_bytes()
    weights = load_file(file)
    weights["layers.0.mlp.up_proj.weight"][0, 0] += 1e-3
    try:
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(ArtifactError, match=r"expected 'base' from .*1 tensors differ, first 'base.layers.0.mlp"):
            restore(Checkpoint.load(other / "statements"), SPEC)
    finally:
        file.write_bytes(original)
    restore(Checkpoint.load(other / "statements"), SPEC)


def test_a_checkpoint_without_its_projection_is_refused(trained: Path, tmp_path: Path) -> None:
    """The public project goes on with a random one."""
    folder = tmp_path / "statements"
    shutil.copytree(trained / "statements", folder)
    weights = load_file(folder / "weights.safetensors")
    del weights["projection.weight"]
    save_file(weights, folder / "weights.safetensors")
    with pytest.raises(ArtifactError):
        Checkpoint.load(folder)


def naive_metrics(papers: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """The metrics by their definitions, one query after the other."""
    found: dict[str, list[float]] = {name: [] for name in ("mrr", "map", "p@1", "p@5", "p@10", "r@10", "r@100")}
    for query in range(len(papers)):
        others = [i for i in range(len(papers)) if i != query]
        relevant = {i for i in others if papers[i] == papers[query]}
        if not relevant:
            continue
        ranked = [i in relevant for i in sorted(others, key=lambda i: (-scores[query, i], i))]
        ranks = [rank for rank, hit in enumerate(ranked, 1) if hit]
        found["mrr"].append(1 / ranks[0])
        found["map"].append(float(np.mean([i / rank for i, rank in enumerate(ranks, 1)])))
        for k in (1, 5, 10):
            found[f"p@{k}"].append(sum(ranked[:k]) / k)
        for k in (10, 100):
            found[f"r@{k}"].append(sum(ranked[:k]) / len(relevant))
    return {name: float(np.mean(values)) for name, values in found.items()}


@pytest.mark.parametrize("block", [1, 500, 1 << 24])
def test_metrics_are_those_of_their_definitions_whatever_the_blocks(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "BLOCK_SCORES", block)
    rng = np.random.default_rng(0)
    papers = np.repeat(np.arange(14), rng.integers(1, 9, 14))
    scores = rng.normal(size=(len(papers), len(papers))).round(1)  # with ties
    got = metrics.measure(papers, lambda rows: torch.from_numpy(scores)[rows])
    want = naive_metrics(papers, scores)
    assert {name: got[name] for name in want} == pytest.approx(want)


def test_bm25_is_the_formula() -> None:
    texts = ["the ring is local", "the ring ring", "a field", "Local \\field the"]
    words = [["the", "ring", "is", "local"], ["the", "ring", "ring"], ["a", "field"], ["local", "\\field", "the"]]
    mean = np.mean([len(each) for each in words])
    want = np.zeros((4, 4))
    for q, query in enumerate(words):
        for d, document in enumerate(words):
            for term in query:
                appears = sum(term in each for each in words)
                tf = document.count(term)
                idf = np.log(1 + (4 - appears + 0.5) / (appears + 0.5))
                want[q, d] += idf * tf * 2.5 / (tf + 1.5 * (0.25 + 0.75 * len(document) / mean))
    got = metrics.bm25(texts)(torch.arange(4)).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)

"""H-Net: public names and sizes, and a stream that equals a pass over the whole text."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from runtimes.errors import InputError
from training.models.hnet.arch import check, parse_arch, state_shapes
from training.models.hnet.module import HNetForCausalLM, is_continuation
from training.models.hnet.spec import CONFIG

SMALL = {**CONFIG, "d_state": 16, "attention_window": 319, "attention_capacity": 320}
ARCHS = {
    "one stage": {"model_arch": "m2 T2", "model_dim": "64 128"},
    "two stages": {"model_arch": "m1 T1m1 M1T1", "model_dim": "64 128 192"},
    "SSM inside, attention outside": {"model_arch": "T1m1 M1", "model_dim": "64 64", "attention_window": 11},
    "a ring that goes round": {"model_arch": "m1 T2", "model_dim": "64 64", "attention_capacity": 20},
    "aligned": {"model_arch": "m1 t1", "model_dim": "64 64", "align": "utf8"},
    "no stage": {"model_arch": "T2", "model_dim": "64"},
}
every_arch = pytest.mark.parametrize("name", ARCHS)


@cache
def model(name: str) -> HNetForCausalLM:
    """Larger weights than those a model begins with, so that boundaries are not all alike."""
    torch.manual_seed(0)
    module = HNetForCausalLM({**SMALL, **ARCHS[name]}).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter += 0.03 * torch.randn_like(parameter)
    return module


def texts(rows: int, time: int, seed: int = 0) -> Tensor:
    letters = np.random.default_rng(seed).integers(0x0C05, 0x0C39, (rows, time))
    spelled = ["".join(chr(c) if c % 5 else " " for c in row).encode()[:time] for row in letters]
    return torch.tensor([list(row) for row in spelled])


def stream(module: HNetForCausalLM, ids_BT: Tensor) -> list[Tensor]:
    """Logits, p and b of every step, [B, T, ...] each."""
    state, printed = module.zero_state(len(ids_BT)), []
    for ids_B in ids_BT.unbind(1):
        *now, state = module.step(ids_B, state)
        printed.append(now)
    return [torch.stack(part, 1) for part in zip(*printed, strict=True)]


# Sizes and names


@pytest.mark.parametrize(
    ("arch", "dim", "count"),
    [
        ("m2 T4", "256 256", 5_207_136),
        ("m1 T2", "256 256", 2_767_920),
        ("m4 T4", "256 256", 7_068_864),
        ("m2 T4", "256 512", 15_040_096),
        ("m2 T4", "256 768", 30_509_152),
        ("m4 T8", "256 512", 29_750_976),
    ],
)
def test_a_model_has_as_many_parameters_as_the_published_one(arch: str, dim: str, count: int) -> None:
    with torch.device("meta"):
        module = HNetForCausalLM({**CONFIG, "model_arch": arch, "model_dim": dim})
    assert sum(parameter.numel() for parameter in module.parameters()) == count


def mamba_keys(prefix: str, width: int, state: int) -> dict[str, tuple[int, ...]]:
    inner, heads = 2 * width, 2 * width // 64
    return {
        f"{prefix}.norm1.weight": (width,),
        f"{prefix}.mixer.in_proj.weight": (2 * inner + 2 * state + heads, width),
        f"{prefix}.mixer.conv1d.weight": (inner + 2 * state, 1, 4),
        f"{prefix}.mixer.conv1d.bias": (inner + 2 * state,),
        f"{prefix}.mixer.A_log": (heads,),
        f"{prefix}.mixer.dt_bias": (heads,),
        f"{prefix}.mixer.D": (heads,),
        f"{prefix}.mixer.norm.weight": (inner,),
        f"{prefix}.mixer.out_proj.weight": (width, inner),
    }


def attention_keys(prefix: str, width: int, mlp: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.norm1.weight": (width,),
        f"{prefix}.mixer.Wqkv.weight": (3 * width, width),
        f"{prefix}.mixer.out_proj.weight": (width, width),
        f"{prefix}.norm2.weight": (width,),
        f"{prefix}.mlp.fc1.weight": (2 * mlp, width),
        f"{prefix}.mlp.fc2.weight": (width, mlp),
    }


def stage_keys(prefix: str, width: int, inside: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """A stage whose encoder and decoder are one Mamba-2 layer each."""
    return {
        **mamba_keys(f"{prefix}.encoder.layers.0", width, 16),
        f"{prefix}.encoder.rmsnorm.weight": (width,),
        f"{prefix}.routing_module.q_proj_layer.weight": (width, width),
        f"{prefix}.routing_module.k_proj_layer.weight": (width, width),
        f"{prefix}.residual_proj.weight": (width, width),
        f"{prefix}.residual_proj.bias": (width,),
        **inside,
        **mamba_keys(f"{prefix}.decoder.layers.0", width, 16),
        f"{prefix}.decoder.rmsnorm.weight": (width,),
    }


def test_a_public_state_dict_of_two_stages_loads() -> None:
    """goombalab/hnet: the innermost layers lie one main_network deeper than the last stage, and pads with the child."""
    inside = "backbone.main_network.main_network"
    innermost = {
        f"{inside}.pad_dimension": (64,),
        **attention_keys(f"{inside}.main_network.layers.0", 192, 512),
        f"{inside}.main_network.rmsnorm.weight": (192,),
    }
    second = {"backbone.main_network.pad_dimension": (64,), **stage_keys("backbone.main_network", 128, innermost)}
    keys = {"embeddings.weight": (256, 64), "lm_head.weight": (256, 64), **stage_keys("backbone", 64, second)}
    torch.manual_seed(0)
    twin = {name: torch.randn(shape) for name, shape in keys.items()}
    module = HNetForCausalLM({**SMALL, "model_arch": "m1 m1 T1", "model_dim": "64 128 192"})
    module.load_state_dict(twin, strict=True)
    assert all(torch.equal(tensor, twin[name]) for name, tensor in module.state_dict().items())


def test_one_stage_of_one_width_has_no_pad() -> None:
    names = model("a ring that goes round").state_dict().keys()
    assert not any("pad_dimension" in name for name in names)
    assert "backbone.main_network.main_network.layers.1.mixer.Wqkv.weight" in names


@pytest.mark.parametrize(
    ("written", "nested"),
    [
        ("m4 T22", '["m4", ["T22"], "m4"]'),
        ("m4 T1m4 T26", '["m4", ["T1m4", ["T26"], "m4T1"], "m4"]'),
        ("T3", '["T3"]'),
    ],
)
def test_both_written_forms_are_one(written: str, nested: str) -> None:
    assert parse_arch(written) == parse_arch(nested)


@pytest.mark.parametrize("written", ["", "x2 T4", "m2T", "m0 T4", "m2 4T", "[1]", '["m2", "T4"]', "[", "m2 T9999"])
def test_an_architecture_that_cannot_be_read_is_refused(written: str) -> None:
    with pytest.raises(InputError, match="model_arch: expected") as caught:
        parse_arch(written)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_dim": "256"}, "a width for each of the 2 stages of model_arch 'm2 T4', found 1"),
        ({"model_arch": "m2 m2 T4"}, "each of the 3 stages"),
        ({"model_dim": "256 wide"}, "whole numbers"),
        ({"model_dim": "256 300"}, "multiples of 64, .* found 300"),
        ({"model_dim": "512 256"}, "no stage narrower"),
        ({"d_state": 0}, "d_state of 1 or more"),
        ({"align": "utf16"}, "align of none, utf8; found 'utf16'"),
    ],
)
def test_a_stage_list_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check({**CONFIG, **change})


def test_zero_and_identity_initializations_hold() -> None:
    torch.manual_seed(0)
    module = HNetForCausalLM({**SMALL, **ARCHS["one stage"]})
    stage = module.backbone
    assert not stage.residual_proj.weight.any()
    assert stage.residual_proj.weight.dtype == torch.float32
    assert not stage.main_network.pad_dimension.any()  # type: ignore[union-attr]
    for layer in (stage.routing_module.q_proj_layer, stage.routing_module.k_proj_layer):
        assert torch.equal(layer.weight, torch.eye(64))
    inner = stage.main_network.main_network.layers[0]  # type: ignore[union-attr, index]
    # Four branches lie along the path to the innermost layers' own four: 2 + 2 of the encoder and decoder.
    assert inner.mlp.fc2.weight.std().item() == pytest.approx(0.02 / 8**0.5, rel=0.05)
    assert inner.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert stage.encoder.layers[0].mixer.out_proj.weight.std().item() == pytest.approx(0.02 / 4**0.5, rel=0.05)


# Streams


@every_arch
def test_300_streamed_bytes_are_one_full_forward(name: str) -> None:
    ids = texts(3, 300)
    lengths = torch.tensor([300, 120, 1])
    logits, p, b = model(name)(ids, lengths)
    printed = stream(model(name), ids)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(printed[0][row, :length], logits[row, :length], rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(printed[1][row, :length], p[row, :length], rtol=2e-6, atol=2e-6)
        assert torch.equal(printed[2][row, :length], b[row, :length])
    if b.shape[-1]:
        assert 0.05 < b[0].float().mean() < 0.95, "expected boundaries here and there"


@every_arch
def test_rows_at_different_positions_do_not_mix(name: str) -> None:
    """One row is 40 bytes ahead of the other; each has the outputs that it has alone."""
    module, ids = model(name), texts(2, 100)
    ahead = module.zero_state(1)
    for t in range(40):
        *_, ahead = module.step(ids[:1, t], ahead)
    state = {key: torch.cat([ahead[key], zero]) for key, zero in module.zero_state(1).items()}
    printed = []
    for t in range(60):
        logits, _, _, state = module.step(torch.stack([ids[0, 40 + t], ids[1, t]]), state)
        printed.append(logits)
    got = torch.stack(printed, 1)
    torch.testing.assert_close(got[0], stream(module, ids[:1])[0][0, 40:], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(got[1], stream(module, ids[1:])[0][0, :60], rtol=2e-5, atol=2e-5)


def test_the_main_network_runs_only_for_rows_where_a_chunk_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    module, ids = model("one stage"), texts(4, 60)
    inner = module.backbone.main_network
    ran: list[int] = []
    step = inner.step  # type: ignore[union-attr]
    monkeypatch.setattr(inner, "step", lambda x, *rest: (ran.append(len(x)), step(x, *rest))[1])
    _, _, b = stream(module, ids)
    begun = b[..., 0].sum(0)
    assert ran == [count for count in begun.tolist() if count]
    assert 0 in begun or min(ran) < 4


@every_arch
def test_a_state_is_not_written_to_and_has_the_declared_shape(name: str) -> None:
    module, ids = model(name), texts(2, 3)
    state = module.zero_state(2)
    *_, state = module.step(ids[:, 0], state)
    before = {key: tensor.clone() for key, tensor in state.items()}
    *_, after = module.step(ids[:, 1], state)
    assert all(torch.equal(state[key], tensor) for key, tensor in before.items())
    shapes = state_shapes({**SMALL, **ARCHS[name]})
    assert list(after) == list(shapes)
    assert {key: tuple(tensor.shape[1:]) for key, tensor in after.items()} == shapes


# Ragged batches


@every_arch
def test_rows_and_padding_do_not_leak(name: str) -> None:
    module, ids = model(name), texts(3, 90)
    lengths = torch.tensor([90, 50, 7])
    together = module(ids, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = module(ids[row : row + 1, :length], lengths[row : row + 1])
        for got, want in zip(together, alone, strict=True):
            torch.testing.assert_close(got[row, :length], want[0], rtol=2e-5, atol=2e-5)
    assert not together[2][1, 50:].any()
    assert not together[1][2, 7:].any()
    other = ids.clone()
    other[1, 50:] = 65
    changed = module(other, lengths)
    for got, want in zip(changed, together, strict=True):
        torch.testing.assert_close(got[1, :50], want[1, :50], rtol=2e-5, atol=2e-5)


@every_arch
def test_no_position_depends_on_the_future_and_each_on_the_past(name: str) -> None:
    module, ids = model(name), texts(1, 80)
    other = ids.clone()
    other[0, 40] = (other[0, 40] + 1) % 128
    want, got = (module(rows, torch.tensor([80]))[0] for rows in (ids, other))
    torch.testing.assert_close(got[:, :40], want[:, :40], rtol=2e-5, atol=2e-5)
    assert (got[:, 40] - want[:, 40]).abs().max() > 1e-3


def test_an_aligned_model_never_begins_inside_a_code_point_and_another_does() -> None:
    ids = texts(4, 200)
    for name, aligned in (("aligned", True), ("one stage", False)):
        b = model(name)(ids, torch.full((4,), 200))[2]
        inside = b[..., 0] & is_continuation(ids)
        assert inside[:, 1:].any() != aligned
        assert b[:, 0].all()


def test_autocast_leaves_recurrence_routing_and_residual_in_float32() -> None:
    torch.manual_seed(0)
    module = HNetForCausalLM({**SMALL, **ARCHS["one stage"]})
    with torch.autocast("cpu", torch.bfloat16):
        logits, p, _ = module(texts(2, 40), torch.tensor([40, 40]))
    assert logits.dtype == p.dtype == torch.float32
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())

"""Policies: a window is its steps, layers are what the papers say, and nobody sees the future."""

import itertools
import math
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from runtimes.pipelines.policy.melee import ACTION_COUNT, CHARACTER_COUNT, COLUMNS, HEADS, ID_COLUMNS
from training.models.policy import blocks
from training.models.policy.blocks import Mamba, WindowAttention
from training.models.policy.module import Policy
from training.models.policy.spec import SPECS
from training.spec import ModelSpec

BY_NAME = {spec.name: spec for spec in SPECS}
MODELS = [(spec, preset) for spec in SPECS for preset in spec.presets]
every_model = pytest.mark.parametrize(("spec", "preset"), MODELS, ids=[f"{s.name} {p}" for s, p in MODELS])
every_tiny = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
State = tuple[Tensor, ...]


@cache
def policy(spec_name: str, preset: str = "tiny", **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    spec = BY_NAME[spec_name]
    return spec.interface.build({**spec.preset(preset), **changes}).eval().requires_grad_(False)


def frames(batch: int, time: int, seed: int = 0) -> Tensor:
    sizes = {"batch": batch, "time": time}
    return torch.from_numpy(SPECS[0].parity.draw_inputs({}, np.random.default_rng(seed), sizes, {})["frames"])


def zero_state(spec: ModelSpec, preset: str, batch: int) -> State:
    arrays = spec.interface.signature(spec.preset(preset)).zero_state(batch)
    return tuple(torch.from_numpy(array) for array in arrays.values())


def run(module: nn.Module, frames_BTF: Tensor, state: State, pieces: Iterable[int]) -> tuple[list[Tensor], State]:
    """Logits of each head over all pieces, and the last state."""
    outputs, start = [], 0
    for size in pieces:
        out = module(frames_BTF[:, start : start + size], *state)
        logits, state = out[: len(HEADS)], out[len(HEADS) :]
        outputs.append(logits)
        start += size
    assert start == frames_BTF.shape[1]
    return [torch.cat(parts, 1) for parts in zip(*outputs, strict=True)], state


def assert_same(got: Iterable[Tensor], want: Iterable[Tensor], tolerance: float = 3e-5) -> None:
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def largest_difference(got: Iterable[Tensor], want: Iterable[Tensor]) -> float:
    return max((one - other).abs().max().item() for one, other in zip(got, want, strict=True))


@every_model
@pytest.mark.parametrize("batch", [1, 3])
def test_a_sequence_is_its_steps_and_its_uneven_pieces(spec: ModelSpec, preset: str, batch: int) -> None:
    module, x, zero = policy(spec.name, preset), frames(batch, 75), zero_state(spec, preset, batch)
    whole, last = run(module, x, zero, [75])
    for pieces in ([1] * 75, (1, 29, 2, 31, 12)):
        logits, state = run(module, x, zero, pieces)
        assert_same(logits, whole)
        assert_same(state, last)


@every_model
def test_outputs_keep_to_the_signature(spec: ModelSpec, preset: str) -> None:
    signature = spec.interface.signature(spec.preset(preset))
    for batch, time in ((1, 1), (2, 3), (5, 40)):
        inputs = {"frames": frames(batch, time).numpy(), **signature.zero_state(batch)}
        outputs = policy(spec.name, preset)(*(torch.from_numpy(array) for array in inputs.values()))
        named = {tensor.name: value.numpy() for tensor, value in zip(signature.outputs, outputs, strict=True)}
        signature.check_outputs(named, signature.check_inputs(inputs))
        assert [named[head].shape[-1] for head in HEADS] == list(HEADS.values())


@every_tiny
def test_a_row_does_not_depend_on_its_neighbours(spec: ModelSpec) -> None:
    x = frames(8, 40)
    together, _ = run(policy(spec.name), x, zero_state(spec, "tiny", 8), [40])
    for row in (0, 7):
        alone, _ = run(policy(spec.name), x[row : row + 1], zero_state(spec, "tiny", 1), [40])
        assert_same(alone, [logits[row : row + 1] for logits in together])


@every_tiny
def test_a_row_reset_to_zero_is_fresh_and_the_others_go_on(spec: ModelSpec) -> None:
    module, x = policy(spec.name), frames(3, 80)
    whole, _ = run(module, x, zero_state(spec, "tiny", 3), [80])
    _, state = run(module, x[:, :40], zero_state(spec, "tiny", 3), [40])
    for tensor in state:
        tensor[1] = 0
    after, _ = run(module, x[:, 40:], state, [1, 20, 19])
    fresh, _ = run(module, x[1:2, 40:], zero_state(spec, "tiny", 1), [40])
    assert_same([logits[1:2] for logits in after], fresh)
    for row in (0, 2):
        assert_same([logits[row] for logits in after], [logits[row, 40:] for logits in whole])
    assert largest_difference([logits[1:2] for logits in after], [logits[1:2, 40:] for logits in whole]) > 1e-3


@every_tiny
def test_the_state_given_is_not_written_to(spec: ModelSpec) -> None:
    _, state = run(policy(spec.name), frames(2, 33), zero_state(spec, "tiny", 2), [33])
    before = [tensor.clone() for tensor in state]
    run(policy(spec.name), frames(2, 5, seed=1), state, [5])
    assert all(torch.equal(one, other) for one, other in zip(state, before, strict=True))


@every_tiny
@pytest.mark.parametrize("place", [0, 17, 59])
def test_no_position_sees_the_future(spec: ModelSpec, place: int) -> None:
    module, x, zero = policy(spec.name), frames(1, 60), zero_state(spec, "tiny", 1)
    other = x.clone()
    other[:, place, :ID_COLUMNS] += 1
    (want, _), (got, _) = run(module, x, zero, [60]), run(module, other, zero, [60])
    assert largest_difference((h[:, :place] for h in got), (h[:, :place] for h in want)) < 1e-6 if place else True
    assert largest_difference((h[:, place] for h in got), (h[:, place] for h in want)) > 1e-3


def test_ids_reach_only_embeddings() -> None:
    """Renaming every id, and the rows of the tables with them, changes nothing: an id is no number."""
    rng = np.random.default_rng(0)
    actions, characters = (torch.from_numpy(rng.permutation(n)) for n in (ACTION_COUNT, CHARACTER_COUNT))
    for spec in SPECS:
        config = spec.preset("tiny")
        renamed = Policy(config).eval()
        renamed.load_state_dict(policy(spec.name).state_dict())
        with torch.no_grad():
            renamed.input.action_embedding.weight[actions] = policy(spec.name).input.action_embedding.weight
            renamed.input.character_embedding.weight[characters] = policy(spec.name).input.character_embedding.weight
        x, zero = frames(2, 35), zero_state(spec, "tiny", 2)
        other = x.clone()
        other[..., ID_COLUMNS : ID_COLUMNS + 2] = actions[x[..., ID_COLUMNS : ID_COLUMNS + 2].long()].float()
        other[..., ID_COLUMNS + 2 :] = characters[x[..., ID_COLUMNS + 2 :].long()].float()
        (want, _), (got, _) = run(policy(spec.name), x, zero, [35]), run(renamed, other, zero, [35])
        assert largest_difference(got, want) < 1e-6
        (unlike, _) = run(policy(spec.name), other, zero, [35])
        assert largest_difference(unlike, want) > 1e-3


@pytest.mark.parametrize("column", range(4))
def test_each_of_the_four_ids_is_looked_up_in_its_own_table_and_place(column: int) -> None:
    module = policy("policy_gru").input
    table = (module.action_embedding, module.character_embedding)[column // 2].weight
    width, x = table.shape[1], frames(1, 1)
    x[..., ID_COLUMNS + column] = 31
    embedded = module(x)[0, 0]
    start = ID_COLUMNS + column * width
    assert torch.equal(embedded[start : start + width], table[31])
    assert embedded.shape == (module.width,)


@pytest.mark.parametrize("previous_controller", [False, True])
@every_tiny
def test_the_previous_controller_is_heard_only_if_asked_for(spec: ModelSpec, previous_controller: bool) -> None:
    module = policy(spec.name, previous_controller=previous_controller)
    x, zero = frames(1, 8), zero_state(spec, "tiny", 1)
    other = x.clone()
    other[..., COLUMNS["controller"]] = 1 - other[..., COLUMNS["controller"]]
    (want, _), (got, _) = run(module, x, zero, [8]), run(module, other, zero, [8])
    assert (largest_difference(got, want) > 1e-3) is previous_controller


def far_difference(name: str, preset: str, back: int) -> float:
    """How far a change of 20 frames moves the logits `back` frames after the last of them."""
    module, x, zero = policy(name, preset), frames(1, back + 20), zero_state(BY_NAME[name], preset, 1)
    other = x.clone()
    other[:, :20, :ID_COLUMNS] += 3
    (want, _), (got, _) = run(module, x, zero, [back + 20]), run(module, other, zero, [back + 20])
    return largest_difference((head[:, -1] for head in got), (head[:, -1] for head in want))


@pytest.mark.parametrize("preset", ["tiny", "full"])
def test_jamba_and_mamba_remember_farther_than_attention_and_convolution_reach(
    monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    assert far_difference("policy_jamba", preset, 120) > 1e-5
    assert far_difference("policy_mamba", preset, 120) > 1e-5
    assert far_difference("policy_attention", preset, 120) == 0

    def forgetful(x: Tensor, step: Tensor, A: Tensor, in_: Tensor, out: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return x * step * (in_ * out).sum(-1, keepdim=True), state

    monkeypatch.setattr(blocks, "selective_scan", forgetful)
    assert far_difference("policy_jamba", preset, 120) == 0, "without the recurrence there is nothing else to remember"


def test_jamba_has_attention_in_every_third_layer() -> None:
    kinds = [type(mixer) for mixer in policy("policy_jamba", "full").backbone.mixers]
    assert kinds == [Mamba, Mamba, WindowAttention] * 2
    attention = next(mixer for mixer in policy("policy_jamba").backbone.mixers if isinstance(mixer, WindowAttention))
    assert isinstance(attention.query_norm, nn.LayerNorm), "QK norm keeps Jamba's logits from growing"


# Mamba ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hidden", "rank"), [(64, 4), (256, 16), (72, 5)])
def test_mamba_has_the_parameters_of_mamba_ssm(hidden: int, rank: int) -> None:
    inner, size = 2 * hidden, 16
    assert {name: tuple(tensor.shape) for name, tensor in Mamba(hidden).state_dict().items()} == {
        "in_proj.weight": (2 * inner, hidden),
        "conv1d.weight": (inner, 1, 4),
        "conv1d.bias": (inner,),
        "x_proj.weight": (rank + 2 * size, inner),
        "dt_proj.weight": (inner, rank),
        "dt_proj.bias": (inner,),
        "A_log": (inner, size),
        "D": (inner,),
        "out_proj.weight": (hidden, inner),
    }


def test_mamba_begins_where_the_paper_says() -> None:
    torch.manual_seed(0)
    mixer = Mamba(512)
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(1024, 16))
    assert torch.equal(mixer.D, torch.ones(1024))
    step = nn.functional.softplus(mixer.dt_proj.bias)
    assert step.min() >= 1e-3 * 0.999
    assert step.max() <= 1e-1 * 1.001
    quartiles = step.log().quantile(torch.tensor([0.25, 0.5, 0.75]))  # log-uniform
    want = torch.tensor([math.log(1e-3) + share * math.log(100) for share in (0.25, 0.5, 0.75)])
    torch.testing.assert_close(quartiles, want, atol=0.25, rtol=0)
    assert mixer.dt_proj.weight.abs().max() <= 32**-0.5
    assert mixer.dt_proj.weight.abs().max() > 0.9 * 32**-0.5
    assert all(parameter.requires_grad for parameter in mixer.parameters()), "A and D are learned"


def mamba_zero(mixer: Mamba, batch: int) -> State:
    inner = mixer.D.shape[0]
    return torch.zeros(batch, inner, mixer.taps - 1), torch.zeros(batch, inner, mixer.state_size)


@pytest.mark.parametrize("time", [1, 2, 3, 4, 30, 100])
def test_mamba_is_that_of_transformers(time: int) -> None:
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    torch.manual_seed(1)
    config = MambaConfig(hidden_size=48, state_size=16, conv_kernel=4, expand=2, num_hidden_layers=1, use_mambapy=False)
    theirs = MambaMixer(config, layer_idx=0).eval().requires_grad_(False)
    mixer = Mamba(48).eval().requires_grad_(False)
    for parameter in mixer.parameters():  # away from what both begin with
        parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.load_state_dict(mixer.state_dict(), strict=True)
    x = torch.randn(3, time, 48)
    y, _, _ = mixer(x, *mamba_zero(mixer, 3))
    torch.testing.assert_close(y, theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, _ in Mamba(8).named_parameters()])
def test_every_parameter_of_mamba_matters_to_that_comparison(name: str) -> None:
    torch.manual_seed(1)
    mixer, x = Mamba(48).requires_grad_(False), torch.randn(1, 30, 48)
    for parameter in mixer.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    want, _, _ = mixer(x, *mamba_zero(mixer, 1))
    parameter = mixer.get_parameter(name)
    parameter.add_(0.1 * torch.randn_like(parameter))
    assert (mixer(x, *mamba_zero(mixer, 1))[0] - want).abs().max() > 1e-2


# Attention -----------------------------------------------------------------------------------------------------------


def attention(window: int, normalise: bool = False) -> WindowAttention:
    torch.manual_seed(2)
    layer = WindowAttention(24, heads=3, window=window, normalise=normalise).requires_grad_(False)
    for name, parameter in layer.named_parameters():
        parameter.add_(0.3 * torch.randn_like(parameter) if "norm" in name else 0)
    layer.qkv.weight.mul_(3)  # scores far from even
    return layer


def naive_attention(layer: WindowAttention, x_TH: np.ndarray, first: int) -> np.ndarray:
    """Head by head and position by position in float64; positions count from `first`; angles are complex numbers."""
    weights = {name: tensor.double().numpy() for name, tensor in layer.state_dict().items()}
    projected = x_TH.astype(np.float64) @ weights["qkv.weight"].T + weights["qkv.bias"]
    time, hidden = x_TH.shape
    width = hidden // layer.heads
    query, key, value = (part.reshape(time, layer.heads, width) for part in np.split(projected, 3, -1))
    if isinstance(layer.query_norm, nn.LayerNorm):
        query, key = (normalised(part, weights, name) for part, name in ((query, "query_norm"), (key, "key_norm")))
    turn = 10_000.0 ** (-np.arange(width // 2) / (width // 2))
    mixed = np.zeros((time, layer.heads, width))
    for t, head in itertools.product(range(time), range(layer.heads)):
        seen = range(max(0, t - layer.window + 1), t + 1)
        own = as_complex(query[t, head]) * np.exp(1j * (first + t) * turn)
        scores = [
            (own * np.conj(as_complex(key[s, head]) * np.exp(1j * (first + s) * turn))).sum().real / math.sqrt(width)
            for s in seen
        ]
        share = np.exp(np.array(scores) - max(scores))
        mixed[t, head] = (share / share.sum()) @ value[seen, head]
    return mixed.reshape(time, hidden) @ weights["out.weight"].T + weights["out.bias"]


def as_complex(vector: np.ndarray) -> np.ndarray:
    first, second = np.split(vector, 2)
    return first + 1j * second


def normalised(x: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def attend(layer: WindowAttention, x: Tensor, pieces: Iterable[int]) -> Tensor:
    """Outputs of a stream that begins with an empty cache."""
    past = layer.window - 1
    state = [torch.zeros(len(x), past, x.shape[-1]), torch.zeros(len(x), past, x.shape[-1])]
    seen, outputs, start = torch.zeros(len(x), 1, dtype=torch.int64), [], 0
    for size in pieces:
        y, *state = layer(x[:, start : start + size], *state, seen)
        seen, start = (seen + size).clamp(max=past), start + size
        outputs.append(y)
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("window", [1, 2, 5, 30])
@pytest.mark.parametrize("first", [0, 1000])
def test_attention_is_that_of_a_loop_over_positions(window: int, normalise: bool, first: int) -> None:
    """Wherever the reference begins to count: rotary angles know differences only."""
    layer, x = attention(window, normalise), torch.randn(2, 41, 24)
    want = np.stack([naive_attention(layer, row.numpy(), first) for row in x])
    for pieces in ([41], [1] * 41, [3, 30, 8]):
        np.testing.assert_allclose(attend(layer, x, pieces), want, rtol=2e-4, atol=2e-5)


def test_attention_knows_order() -> None:
    layer, x = attention(30), torch.randn(1, 20, 24)
    swapped = x[:, [1, 0, *range(2, 20)]]
    assert (attend(layer, x, [20])[:, -1] - attend(layer, swapped, [20])[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("window", [1, 5, 30])
@pytest.mark.parametrize("pieces", [[60], [1] * 60])
def test_attention_sees_its_window_and_nothing_else(window: int, pieces: list[int]) -> None:
    layer, x, place = attention(window), torch.randn(1, 60, 24), 20
    other = x.clone()
    other[:, place] += 1
    moved = (attend(layer, other, pieces) - attend(layer, x, pieces)).abs().amax(-1)[0]
    touched = range(place, place + window)
    assert all(moved[t] > 1e-6 for t in touched)
    assert all(moved[t] < 1e-6 for t in range(60) if t not in touched)


def test_attention_does_not_look_at_places_of_the_cache_that_were_never_filled() -> None:
    layer, x = attention(5), torch.randn(1, 3, 24)
    seen = torch.zeros(1, 1, dtype=torch.int64)
    clean = layer(x, torch.zeros(1, 4, 24), torch.zeros(1, 4, 24), seen)[0]
    dirty = layer(x, torch.full((1, 4, 24), 9.0), torch.full((1, 4, 24), 9.0), seen)[0]
    assert torch.equal(clean, dirty)
    assert not torch.allclose(clean, layer(x, torch.full((1, 4, 24), 9.0), torch.full((1, 4, 24), 9.0), seen + 1)[0])

"""The layers of an H-Net agree with their papers and the public code: Mamba-2, attention, routing, smoothing."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from training.models.hnet import routing
from training.models.hnet.blocks import Attention, SwiGLU
from training.models.hnet.mamba2 import Mamba2


def test_mamba2_is_that_of_transformers() -> None:
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    torch.manual_seed(0)
    own = Mamba2(64, 16)
    config = Mamba2Config(
        hidden_size=64, expand=2, num_heads=2, head_dim=64, state_size=16, n_groups=1, conv_kernel=4, chunk_size=32,
        use_bias=False, use_conv_bias=True, layer_norm_epsilon=1e-5, time_step_limit=(0.0, float("inf")),
    )  # fmt: skip
    theirs = Mamba2Mixer(config, layer_idx=0).eval()
    theirs.load_state_dict(own.state_dict(), strict=True)
    x = torch.randn(2, 75, 64)
    with torch.no_grad():
        torch.testing.assert_close(own(x), theirs(x), rtol=2e-5, atol=2e-5)


def reference_mamba2(layer: Mamba2, x_TD: np.ndarray) -> np.ndarray:
    """Section 7 of the paper, position by position and head by head, in float64."""
    weights = {name: tensor.detach().double().numpy() for name, tensor in layer.state_dict().items()}
    inner, state, heads = layer.inner, layer.state_size, layer.heads
    rows = x_TD @ weights["in_proj.weight"].T
    gate, mixed, step = np.split(rows, [inner, 2 * inner + 2 * state], -1)
    padded = np.concatenate([np.zeros((3, mixed.shape[1])), mixed])
    taps = weights["conv1d.weight"][:, 0]
    convolved = sum(padded[k : k + len(mixed)] * taps[:, k] for k in range(4)) + weights["conv1d.bias"]
    convolved = convolved / (1 + np.exp(-convolved))
    out, memory = [], np.zeros((heads, 64, state))
    for t, row in enumerate(convolved):
        x, into, read = np.split(row, [inner, inner + state])
        y = np.zeros((heads, 64))
        for h in range(heads):
            delta = np.log1p(np.exp(step[t, h] + weights["dt_bias"][h]))
            own = x[64 * h : 64 * h + 64]
            memory[h] = np.exp(-delta * np.exp(weights["A_log"][h])) * memory[h] + delta * np.outer(own, into)
            y[h] = memory[h] @ read + weights["D"][h] * own
        y = y.ravel() * gate[t] / (1 + np.exp(-gate[t]))
        out.append(y / np.sqrt((y**2).mean() + 1e-5) * weights["norm.weight"])
    return np.stack(out) @ weights["out_proj.weight"].T


def test_mamba2_is_its_loop_and_its_steps() -> None:
    torch.manual_seed(1)
    layer = Mamba2(128, 8).requires_grad_(False)
    x = torch.randn(2, 150, 128)
    whole = layer(x)
    want = np.stack([reference_mamba2(layer, row.double().numpy()) for row in x])
    np.testing.assert_allclose(whole.numpy(), want, atol=2e-5)
    conv, ssm, printed = torch.zeros(2, 3, 272), torch.zeros(2, 8, 256), []
    for x_now in x.split(1, 1):
        y, conv, ssm = layer.step(x_now, conv, ssm)
        printed.append(y)
    torch.testing.assert_close(torch.cat(printed, 1), whole, rtol=2e-5, atol=2e-5)


def test_attention_turns_32_dimensions_and_reaches_back_so_far() -> None:
    """flash-attn's layout, position by position: q, k and v one after another, pairs (i, i + 16), base 10000."""
    torch.manual_seed(0)
    layer, time, reach = Attention(128, 5).requires_grad_(False), 12, 5
    x = torch.randn(1, time, 128)
    query, key, value = (part.view(time, 2, 64).double() for part in layer.Wqkv(x)[0].split(128, -1))

    def turned(vector: Tensor, place: int) -> Tensor:
        result = vector.clone()
        for i in range(16):
            angle = place * 10_000 ** (-i / 16)
            cos, sin = np.cos(angle), np.sin(angle)
            result[i] = vector[i] * cos - vector[i + 16] * sin
            result[i + 16] = vector[i] * sin + vector[i + 16] * cos
        return result

    rows = []
    for t in range(time):
        heads = []
        for h in range(2):
            seen = range(max(0, t - reach + 1), t + 1)
            scores = torch.stack([turned(query[t, h], t) @ turned(key[s, h], s) / 8 for s in seen])
            heads.append(scores.softmax(0) @ torch.stack([value[s, h] for s in seen]))
        rows.append(torch.cat(heads))
    want = torch.stack(rows).float() @ layer.out_proj.weight.T
    torch.testing.assert_close(layer(x)[0], want, rtol=2e-5, atol=2e-5)


def test_the_mlp_multiplies_its_first_half_by_the_silu_of_its_second() -> None:
    layer = SwiGLU(64)
    x = torch.randn(5, 64)
    y, gate = layer.fc1(x).split(128, -1)
    torch.testing.assert_close(layer(x), layer.fc2(y * nn.functional.silu(gate)))
    assert [SwiGLU(width).fc2.in_features for width in (256, 512, 768)] == [640, 1408, 2048]


def test_a_boundary_is_half_of_one_minus_the_cosine_with_the_projections_of_the_public_code() -> None:
    torch.manual_seed(0)
    router = routing.Router(64).requires_grad_(False)
    nn.init.normal_(router.q_proj_layer.weight)
    x = torch.randn(2, 9, 64)
    p = router(x)
    assert torch.equal(p[:, 0], torch.ones(2))
    for t in range(1, 9):
        earlier, later = router.q_proj_layer(x[:, t - 1]), router.k_proj_layer(x[:, t])
        torch.testing.assert_close(p[:, t], (1 - torch.cosine_similarity(earlier, later)) / 2)
        kept, started = router.earlier(x[:, t - 1 : t]), torch.tensor([[1], [0]])
        printed = router.step(x[:, t : t + 1], kept, started)
        assert printed[:, 0].tolist() == pytest.approx([p[0, t].item(), 1.0])


def test_a_tie_begins_a_segment() -> None:
    assert routing.begins(torch.tensor([0.5, 0.49999997, 1.0, 0.0])).tolist() == [True, False, True, False]


def test_the_gate_is_one_and_lets_the_gradient_of_the_choice_through() -> None:
    p = torch.tensor([0.9, 0.2, 0.5], requires_grad=True)
    gate = routing.confidence_gate(p, routing.begins(p))
    assert gate.tolist() == [1.0, 1.0, 1.0]
    gate.sum().backward()
    assert p.grad.tolist() == [1.0, -1.0, 1.0]  # type: ignore[union-attr]


def test_the_vector_of_a_chunk_comes_back_to_its_positions() -> None:
    boundary = torch.tensor([[1, 0, 0, 1, 1, 0], [1, 1, 0, 0, 0, 0]]).bool()
    chunks = routing.divide(boundary)
    assert chunks.places.tolist() == [[0, 0, 0, 1, 2, 2], [0, 1, 1, 1, 1, 1]]
    assert chunks.real.tolist() == [[True, True, True], [True, True, False]]
    x = torch.arange(12.0).view(2, 6, 1)
    short = routing.downsample(x, chunks)
    assert short[0, :, 0].tolist() == [0, 3, 4]
    assert short[1, :2, 0].tolist() == [6, 7]
    assert routing.upsample(short, chunks)[0, :, 0].tolist() == [0, 0, 0, 3, 4, 4]


def test_smoothing_is_its_loop_also_where_boundaries_are_sure() -> None:
    rng = np.random.default_rng(0)
    z, p = rng.normal(size=(2, 300, 8)), rng.uniform(0, 1, (2, 300))
    p[0, ::3], p[1, 5:200] = 1.0, 0.9999999
    average, want, state = np.zeros((2, 8)), [], torch.zeros(2, 8)
    for k in range(300):
        held = p[:, k, None].clip(1e-4, 1 - 1e-4)
        average = held * z[:, k] + (1 - held) * average
        want.append(average)
        state = routing.smooth_step(torch.tensor(z[:, k]).float(), torch.tensor(p[:, k]).float(), state)
    got = routing.smooth(torch.tensor(z).float(), torch.tensor(p).float())
    np.testing.assert_allclose(got.numpy(), np.stack(want, 1), atol=2e-6)
    np.testing.assert_allclose(state.numpy(), average, atol=2e-6)

"""Linear recurrences h_t = a_t h_(t-1) + b_t in several forms that agree, and the choice among them.

Shapes: B batch, T time, D channels, N state size; H heads and P channels of a head.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from training.layers.form import Form as Form
from training.layers.form import current_form
from training.layers.form import scan_form as scan_form

PIECE = 64  # positions whose mutual influence is one matrix; fastest for training on a CPU among 32, 64, 128


def selective_scan(
    x_BTD: Tensor, step_BTD: Tensor, A_DN: Tensor, in_BTN: Tensor, out_BTN: Tensor, state_BDN: Tensor
) -> tuple[Tensor, Tensor]:
    """y_t = C_t . h_t with h_t = exp(step_t A) h_(t-1) + step_t B_t x_t, and the last h.

    Source: Gu and Dao, Mamba (2023), equations 2 and 3 with the simplified discretisation of B. `in` is B, `out` is C.
    A must be negative, or the forms lose precision differently.
    """
    arguments = (x_BTD, step_BTD, A_DN, in_BTN, out_BTN, state_BDN)
    form = current_form() or (Form(kind="kernel") if _has_kernel(x_BTD) else Form(kind="loop"))
    if form.kind == "doubling":
        return _doubling(*arguments, length=form.length)
    return {"loop": _loop, "operator": _operator, "kernel": _kernel}[form.kind](*arguments)


def decayed_sums(
    x_BTHP: Tensor, decay_BTH: Tensor, in_BTN: Tensor, out_BTN: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """y_t = S_t C_t with S_t = exp(decay_t) S_(t-1) + x_t B_t^T, and the last S. `in` is B, `out` is C, decay <= 0.

    Source: Dao and Gu, Transformers are SSMs (2024), sections 6 and 7: inside a piece of the sequence a masked product
    of C and B, from piece to piece the state. While a model is traced, all pieces are computed at once; a sequence
    whose length only the data tell is one piece.
    """
    arguments = (x_BTHP, decay_BTH, in_BTN, out_BTN)
    form = current_form()
    if form and form.kind == "loop":
        return _decayed_loop(*arguments, state_BHPN)
    if form and form.kind != "kernel":
        every = _decayed_piece if _is_data(x_BTHP.shape[1]) else _decayed_pieces
        return every(*arguments, state_BHPN)
    outputs = []
    for start in range(0, x_BTHP.shape[1], PIECE):
        now = tuple(tensor[:, start : start + PIECE] for tensor in arguments)
        y_BTHP, state_BHPN = _decayed_piece(*now, state_BHPN)  # type: ignore[call-arg]
        outputs.append(y_BTHP)
    return torch.cat(outputs, 1), state_BHPN


def decayed_step(
    x_BHP: Tensor, decay_BH: Tensor, in_BN: Tensor, out_BN: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """One position of `decayed_sums`: (y [B, H, P], the state after it)."""
    state_BHPN = torch.exp(decay_BH)[..., None, None] * state_BHPN + x_BHP[..., None] * in_BN[:, None, None, :]
    return (state_BHPN @ out_BN[:, None, :, None])[..., 0], state_BHPN


def _decayed_piece(
    x_BTHP: Tensor, decay_BTH: Tensor, in_BTN: Tensor, out_BTN: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    kept_BHTT = torch.exp(_decay_between(decay_BTH))
    last_BHPN = torch.exp(decay_BTH.sum(1))[..., None, None] * state_BHPN + _added(x_BTHP, kept_BHTT, in_BTN)
    return _said(x_BTHP, decay_BTH, kept_BHTT, in_BTN, out_BTN, state_BHPN), last_BHPN


def _decayed_pieces(
    x_BTHP: Tensor, decay_BTH: Tensor, in_BTN: Tensor, out_BTN: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """`_decayed_piece` without a loop: what every piece adds, the state before every piece, then what each says.

    C pieces of Q positions. What all heads share is one product for all of them, of I = H x P channels.
    """
    time, (heads, channels) = x_BTHP.shape[1], x_BTHP.shape[2:]
    # torch.export 2.13 asks of every size whether it is 1, so there are two pieces at least.
    pieces = torch.sym_max((time + PIECE - 1) // PIECE, 2)

    def cut(tensor: Tensor) -> Tensor:
        """[B, T, ...] as [B, C, Q, ...], filled up with zeros, which add and decay nothing."""
        filled = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, pieces * PIECE - time))
        return filled.unflatten(1, (pieces, PIECE))

    x_BCQHP, decay_BCQH, in_BCQN, out_BCQN = cut(x_BTHP), cut(decay_BTH), cut(in_BTN), cut(out_BTN)
    kept_BCHQQ = torch.exp(_decay_between(decay_BCQH))
    added_BCNI = in_BCQN.mT @ (x_BCQHP * kept_BCHQQ[..., -1, :].mT[..., None]).flatten(-2)
    # The first of S states is the one before all pieces, and nothing decays before it.
    states_BSNI = torch.cat([state_BHPN.permute(0, 3, 1, 2).flatten(2)[:, None], added_BCNI], 1)
    between_BHSS = torch.exp(_decay_between(F.pad(decay_BCQH.sum(2), (0, 0, 1, 0))))
    states_BHSNP = states_BSNI.unflatten(-1, (heads, channels)).permute(0, 3, 1, 2, 4)
    states_BHSNP = (between_BHSS @ states_BHSNP.flatten(3)).unflatten(3, states_BHSNP.shape[3:])
    states_BSNI = states_BHSNP.permute(0, 2, 3, 1, 4).flatten(3)
    weights_BCHQQ = kept_BCHQQ * (out_BCQN @ in_BCQN.mT)[:, :, None]
    within_BCQHP = (weights_BCHQQ @ x_BCQHP.transpose(2, 3)).transpose(2, 3)
    before_BCQHP = (out_BCQN @ states_BSNI[:, :-1]).unflatten(-1, (heads, channels))
    y_BCQHP = within_BCQHP + before_BCQHP * torch.exp(decay_BCQH.cumsum(2))[..., None]
    # Picked and not cut: torch.export 2.13 would ask whether the pieces are longer than the sequence.
    y_BTHP = y_BCQHP.flatten(1, 2).index_select(1, torch.arange(time, device=x_BTHP.device))
    return y_BTHP, states_BHSNP[:, :, -1].mT


def _said(
    x_THP: Tensor, decay_TH: Tensor, kept_HTT: Tensor, in_TN: Tensor, out_TN: Tensor, state_HPN: Tensor
) -> Tensor:
    """y [..., T, H, P] of pieces [..., T, H, P] that begin with these states; `kept` of s at t is in their matrix."""
    weights_HTT = kept_HTT * (out_TN @ in_TN.mT)[..., None, :, :]
    y_HTP = weights_HTT @ x_THP.transpose(-3, -2)
    reach_HT = decay_TH.cumsum(-2).mT
    y_HTP = y_HTP + (out_TN[..., None, :, :] @ state_HPN.mT) * torch.exp(reach_HT)[..., None]
    return y_HTP.transpose(-3, -2)


def _added(x_THP: Tensor, kept_HTT: Tensor, in_TN: Tensor) -> Tensor:
    """What pieces add to their states by their ends [..., H, P, N]."""
    return (x_THP.transpose(-3, -2) * kept_HTT[..., -1, :, None]).mT @ in_TN[..., None, :, :]


def _is_data(size: Any) -> bool:
    """Whether a size in a trace is read out of the data; such a one cannot be cut into pieces."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return bool(free_unbacked_symbols(size))


def _decay_between(decay_TH: Tensor) -> Tensor:
    """[..., H, T, T]: what decays from position s (last) to t, the sum of decay over s+1..t; minus infinity if t < s.

    A difference of sums from the start would lose to rounding what a strong decay before s has added to both: the sums
    are float64, but for TensorRT, which has none, so that every sum is made by itself.
    """
    place_T = torch.arange(decay_TH.shape[-2], device=decay_TH.device)
    past_TT = place_T[:, None] >= place_T
    if (form := current_form()) and form.kind == "doubling":
        later_TT = place_T[:, None] > place_T
        between_HTT = torch.where(later_TT, decay_TH.mT[..., None], 0.0).cumsum(-2)
    else:
        # Turned before it is summed: ONNX Runtime 1.32 moves a transposition of sums behind their differences.
        reach_HT = decay_TH.mT.double().cumsum(-1)
        between_HTT = (reach_HT[..., :, None] - reach_HT[..., None, :]).to(decay_TH.dtype)
    # Added, which is faster in ONNX Runtime than a choice.
    future_TT = torch.zeros_like(past_TT, dtype=decay_TH.dtype).masked_fill(~past_TT, -torch.inf)
    return between_HTT + future_TT


def _decayed_loop(
    x_BTHP: Tensor, decay_BTH: Tensor, in_BTN: Tensor, out_BTN: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(x_BTHP.shape[1]):
        y_BHP, state_BHPN = decayed_step(x_BTHP[:, t], decay_BTH[:, t], in_BTN[:, t], out_BTN[:, t], state_BHPN)
        outputs.append(y_BHP)
    return torch.stack(outputs, 1), state_BHPN


def _loop(
    x_BTD: Tensor, step_BTD: Tensor, A_DN: Tensor, in_BTN: Tensor, out_BTN: Tensor, state_BDN: Tensor
) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(x_BTD.shape[1]):
        decay_BDN = torch.exp(step_BTD[:, t, :, None] * A_DN)
        state_BDN = decay_BDN * state_BDN + (step_BTD[:, t] * x_BTD[:, t])[:, :, None] * in_BTN[:, t, None, :]
        outputs.append((state_BDN @ out_BTN[:, t, :, None])[:, :, 0])
    return torch.stack(outputs, 1), state_BDN


def _doubling(
    x_BTD: Tensor,
    step_BTD: Tensor,
    A_DN: Tensor,
    in_BTN: Tensor,
    out_BTN: Tensor,
    state_BDN: Tensor,
    length: int | None,
) -> tuple[Tensor, Tensor]:
    time = x_BTD.shape[1]
    decay_BTDN = torch.exp(step_BTD[..., None] * A_DN)
    state_BTDN = (step_BTD * x_BTD)[..., None] * in_BTN[:, :, None, :]
    for power in range(math.ceil(math.log2(length or time)) if (length or time) > 1 else 0):
        shift = (0, 0, 0, 0, 2**power, 0)
        state_BTDN = decay_BTDN * F.pad(state_BTDN, shift)[:, :time] + state_BTDN
        decay_BTDN = decay_BTDN * F.pad(decay_BTDN, shift, value=1.0)[:, :time]
    state_BTDN = state_BTDN + decay_BTDN * state_BDN[:, None]
    return (state_BTDN @ out_BTN[..., None])[..., 0], state_BTDN[:, -1]


def _operator(
    x_BTD: Tensor, step_BTD: Tensor, A_DN: Tensor, in_BTN: Tensor, out_BTN: Tensor, state_BDN: Tensor
) -> tuple[Tensor, Tensor]:
    from torch._higher_order_ops.scan import scan

    def step(state_BDN: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        # unsqueeze, not [:, None]: torch 2.13 cannot decompose a sliced symbolic batch inside the operator.
        step_BD, x_BD, in_BN, out_BN = now
        decay_BDN = torch.exp(step_BD.unsqueeze(-1) * A_DN)
        state_BDN = decay_BDN * state_BDN + (step_BD * x_BD).unsqueeze(-1) * in_BN.unsqueeze(1)
        return state_BDN, torch.matmul(state_BDN, out_BN.unsqueeze(-1)).squeeze(-1)

    by_time = tuple(tensor.transpose(0, 1) for tensor in (step_BTD, x_BTD, in_BTN, out_BTN))
    last_BDN, y_TBD = scan(step, state_BDN.contiguous(), by_time, dim=0)
    return y_TBD.transpose(0, 1), last_BDN


def _kernel(
    x_BTD: Tensor, step_BTD: Tensor, A_DN: Tensor, in_BTN: Tensor, out_BTN: Tensor, state_BDN: Tensor
) -> tuple[Tensor, Tensor]:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    x_BDT, step_BDT, in_BNT, out_BNT = (tensor.mT.contiguous() for tensor in (x_BTD, step_BTD, in_BTN, out_BTN))
    y_BDT, last_BDN = selective_scan_fn(x_BDT, step_BDT, A_DN.float(), in_BNT, out_BNT, return_last_state=True)
    # The kernel starts at zero; the initial state's share is added, for the recurrence is linear.
    reach_BTDN = torch.exp(step_BTD.cumsum(1)[..., None] * A_DN) * state_BDN[:, None]
    return y_BDT.mT + (reach_BTDN @ out_BTN[..., None])[..., 0], last_BDN + reach_BTDN[:, -1]


def _has_kernel(tensor: Tensor) -> bool:
    if not tensor.is_cuda:
        return False
    return _mamba_ssm() is not None


def _mamba_ssm() -> Any:
    try:
        import mamba_ssm
    except ImportError:
        return None
    return mamba_ssm

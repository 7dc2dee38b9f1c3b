"""LSTM and GRU that can be traced with a dynamic time axis.

torch.export 2.13 unrolls `torch.lstm` over the traced length and freezes the time axis. While a model is traced, the
cells therefore go through opaque operators of the same arguments; `name_cells` then restores the real names of the
traced nodes, so that the ONNX exporter and eager torch find `aten.lstm` and `aten.gru` as usual.
"""

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

_SCHEMA = (
    "Tensor[] params, bool has_biases, int num_layers, float dropout, bool train, bool bidirectional, bool batch_first"
)
_library = torch.library.Library("slipway", "DEF")
_library.define(f"lstm(Tensor input, Tensor[] hx, {_SCHEMA}) -> (Tensor, Tensor, Tensor)")
_library.define(f"gru(Tensor input, Tensor hx, {_SCHEMA}) -> (Tensor, Tensor)")


def run_cell(cell: nn.LSTM | nn.GRU, x_BTE: Tensor, state_LBH: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The cell's results for a batch-first input and its states: hidden [B, T, H] and the last states [L, B, H]."""
    if not torch.compiler.is_exporting():
        x_BTH, last = cell(x_BTE, state_LBH if len(state_LBH) == 2 else state_LBH[0])
        return x_BTH, last if isinstance(last, tuple) else (last,)
    weights = [getattr(cell, name) for names in cell._all_weights for name in names]
    settings = (cell.bias, cell.num_layers, 0.0, False, cell.bidirectional, True)
    if isinstance(cell, nn.LSTM):
        x_BTH, *last = torch.ops.slipway.lstm(x_BTE, list(state_LBH), weights, *settings)
    else:
        x_BTH, *last = torch.ops.slipway.gru(x_BTE, state_LBH[0], weights, *settings)
    return x_BTH, tuple(last)


def name_cells(program: ExportedProgram) -> ExportedProgram:
    """The program with every traced cell called by its aten name. The program is changed in place."""
    names = {
        torch.ops.slipway.lstm.default: torch.ops.aten.lstm.input,
        torch.ops.slipway.gru.default: torch.ops.aten.gru.input,
    }
    for node in program.graph.nodes:
        node.target = names.get(node.target, node.target)
    program.graph_module.recompile()
    return program


@torch.library.register_fake("slipway::lstm")
def _shape_of_lstm(input, hx, params, *settings):  # type: ignore[no-untyped-def]
    return input.new_empty(*input.shape[:2], hx[0].shape[-1]), torch.empty_like(hx[0]), torch.empty_like(hx[1])


@torch.library.register_fake("slipway::gru")
def _shape_of_gru(input, hx, params, *settings):  # type: ignore[no-untyped-def]
    return input.new_empty(*input.shape[:2], hx.shape[-1]), torch.empty_like(hx)

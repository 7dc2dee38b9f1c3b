"""One ONNX graph that gives the scores, beside one that gives all attention and states for scoring outside.

Shapes: as in the model's module.py.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.hallucination.bench_decoder import TOP_PERCENT, as_tensors, decoder_config, prompt_and_answer
from benchmarks.process_cost import interleaved_cpu_s
from runtimes.errors import InputError, require
from runtimes.host.cli import table
from training.models.hallucination.decoder import Decoder
from training.models.hallucination.features import divergence, pooled, resemblance, top_share, within
from training.models.hallucination.module import TokenDetector
from training.models.hallucination.spec import signature

MAX_TOKENS = 8192


class AllStates(nn.Module):
    """The tensors for scoring outside the graph: attention [L, A, T, T], states in the middle and after [L, T, D]."""

    def __init__(self, base: Decoder) -> None:
        super().__init__()
        self.base = base

    def forward(self, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.arange(token_ids.shape[1]).unsqueeze(0)
        views = []
        for view in self.base.layers(token_ids, len(self.base.model.model.layers)):
            views.append((view.attention(range(view.queries.shape[1]), rows), view.middle, view.after))
        attention, middle, after = (torch.cat(parts) for parts in zip(*views, strict=True))
        return attention, middle, after

    def eagerly(self, given: dict[str, Tensor]) -> list[np.ndarray]:
        """The same from Hugging Face's own modules, with hooks for the states that `output_attentions=True` omits."""
        decoder = self.base.model.model
        middle, after = list[Tensor](), list[Tensor]()
        hooks = [
            layer.post_attention_layernorm.register_forward_pre_hook(lambda _, states: middle.append(states[0]))
            for layer in decoder.layers
        ]
        hooks += [layer.register_forward_hook(lambda *states: after.append(states[-1])) for layer in decoder.layers]
        decoder.set_attn_implementation("eager")
        attention = decoder(given["token_ids"], output_attentions=True).attentions
        for hook in hooks:
            hook.remove()
        return [torch.cat(tuple(parts)).numpy() for parts in (attention, middle, after)]

    def scores_at_once(self, outputs: list[np.ndarray], given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(ECS, PKS) by chunk from these outputs, with torch, all tokens of a layer at a time."""
        attention, middle, after = map(torch.from_numpy, outputs)
        rows, inside = given["rows"], within(given["row_spans"], given["rows"].shape[1])
        final = self.base.normed(after[-1:])
        ecs, pks = [], []
        for layer in range(len(after)):
            chosen, _ = top_share(attention[layer, None, :, rows[0]], given["prompt_range"], TOP_PERCENT, MAX_TOKENS)
            ecs.append(resemblance(chosen, final, rows))
            seen, printed = (self.base.logits(states[layer, rows[0]]) for states in (middle, after))
            pks.append(divergence(seen, printed, "paper", False))
        ecs_BRH = torch.cat(ecs, 1).transpose(1, 2)
        return pooled(ecs_BRH, inside, True), pooled(torch.stack(pks, -1)[None], inside, True)

    def scores_by_token(self, outputs: list[np.ndarray], given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The same by the method of the published code: token by token, head by head."""
        attention, middle, after = map(torch.from_numpy, outputs)
        rows, inside = given["rows"], within(given["row_spans"], given["rows"].shape[1])
        first, last = given["prompt_range"][0].tolist()
        final = self.base.normed(after[-1])
        count = max(1, (last - first) * TOP_PERCENT // 100)
        ecs = torch.empty(1, rows.shape[1], attention.shape[0] * attention.shape[1])
        pks = torch.empty(1, rows.shape[1], len(after))
        for r, n in enumerate(rows[0].tolist()):
            for column, weights in enumerate(attention[:, :, n, first:last].flatten(0, 1)):
                mean = final[weights.topk(count).indices + first].mean(0)
                ecs[0, r, column] = torch.cosine_similarity(mean, final[n], 0)
            for layer in range(len(after)):
                seen, printed = (self.base.logits(states[layer, n]) for states in (middle, after))
                pks[0, r, layer] = divergence(seen, printed, "paper", False)
        return pooled(ecs, inside, True), pooled(pks, inside, True)


def bench_fused(arguments: Any) -> str:
    """CPU milliseconds end to end, interleaved, and the bytes that leave the graph."""
    config = decoder_config(MAX_TOKENS, level="token")
    made = prompt_and_answer(config, arguments.tokens, arguments.rows)
    given = as_tensors(made)
    detector = TokenDetector(config).eval()
    dense_module = AllStates(detector.base).eval()
    names = [tensor.name for tensor in signature(config).outputs]
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        fused = _session(detector, tuple(given.values()), Path(folder, "fused.onnx"), list(made), names)
        dense = _session(
            dense_module,
            (given["token_ids"],),
            Path(folder, "dense.onnx"),
            ["token_ids"],
            ["attention", "middle", "after"],
        )
        ids = {"token_ids": made["token_ids"]}
        ways: dict[str, Callable[[], Any]] = {
            "fused": lambda: fused.run(None, made),
            "all attention, without scores": lambda: dense.run(None, ids),
            "all attention, scored at once": lambda: dense_module.scores_at_once(dense.run(None, ids), given),
            "Hugging Face eager, scored at once": lambda: dense_module.scores_at_once(
                dense_module.eagerly(given), given
            ),
            "all attention, scored by token": lambda: dense_module.scores_by_token(dense.run(None, ids), given),
        }
        _same_scores(ways)
        times = interleaved_cpu_s(ways, arguments.repeats)
        sent = {"fused": fused.run(None, made), "all attention, without scores": dense.run(None, ids)}
    size = {name: sum(array.nbytes for array in arrays) for name, arrays in sent.items()}
    dense_bytes = size["all attention, without scores"]
    rows = [
        (name, f"{1e3 * seconds:.0f}", f"{seconds / times['fused']:.2f}", size.get(name, dense_bytes))
        for name, seconds in times.items()
    ]
    ratio = f"\n\nbytes: {dense_bytes / size['fused']:.0f} times fewer"
    return table(["ONNX Runtime, one thread", "CPU ms", "of fused", "bytes out"], rows) + ratio


def _session(module: nn.Module, given: tuple[Tensor, ...], path: Path, names: list[str], outputs: list[str]) -> Any:
    ort = require("onnxruntime", extra="onnx")
    program = torch.onnx.export(
        module, given, dynamo=True, opset_version=20, input_names=names, output_names=outputs, verbose=False
    )
    assert program is not None  # only the dynamo=False exporter returns None
    program.save(path)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _same_scores(ways: dict[str, Callable[[], Any]]) -> None:
    """`InputError` unless all ways give the same scores; of ECS, one in a hundred may differ, for near ties."""
    found = {name: [np.asarray(part) for part in call()[:2]] for name, call in ways.items() if "without" not in name}
    for name, (ecs, pks) in found.items():
        wanted_ecs, wanted_pks = found["fused"]
        if np.quantile(np.abs(ecs - wanted_ecs), 0.99) > 1e-3 or np.abs(pks - wanted_pks).max() > 1e-5:
            raise InputError(f"expected the scores of 'fused' from '{name}', found others; check torch and onnxruntime")

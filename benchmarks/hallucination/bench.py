"""What the detector costs and what saves some of it: python -m benchmarks.hallucination.bench WHAT

goals    fused, memory, cached and fitting, one after the other
fused    one ONNX graph that gives the scores, beside one that gives all attention and states for scoring outside
memory   peak memory over the length of the prompt, fused and with all attention kept
reading  answers a CPU minute by precision, batching and compilation
cached   requests of a published artifact, first and asked again
served   what each published precision says to made-up answers
fitting  what selection, mutual information, an ensemble and the threshold do for the AUC of a score log

Shapes: as in module.py.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from runtimes.artifact import artifact_name
from runtimes.cache.store import Store
from runtimes.errors import InputError, require
from runtimes.host.cli import command, parser, table
from runtimes.pipeline import open_pipeline
from runtimes.pipelines.hallucination.detector import DetectorCache
from runtimes.repository import find
from runtimes.runtime import open_runtime
from training.config import Config
from training.frozen_store import fill
from training.models.hallucination import fitting
from training.models.hallucination.data import synthetic_examples
from training.models.hallucination.decoder import Decoder
from training.models.hallucination.features import divergence, pooled, resemblance, top_share, within
from training.models.hallucination.metrics import at_threshold, auc
from training.models.hallucination.module import ChunkDetector, TokenDetector
from training.models.hallucination.reading import FeatureReader
from training.models.hallucination.recipe import length_for_pks
from training.models.hallucination.settings import TINY, resolve_config
from training.models.hallucination.spec import draw_inputs, signature
from training.models.hallucination.training import SETTINGS as TRAINING
from training.models.hallucination.units import read_log

CONFIG: Config = {**TINY, "base": "seeded:bench", "heads": "all", "layers": "all", "max_tokens": 8192}
SIZES = {"batch": 1, "chunks": 4, "prompt_chunks": 12, "chunk_tokens": 32, "prompt_chunk_tokens": 48}
LENGTHS = (512, 1024, 2048, 4096, 8192)
PERCENT = TINY["top_percent"]
AGAIN = 20  # times that a request is asked again
SETTINGS: Config = {**TRAINING, "device": "cpu", "seed": 0}


class Everything(nn.Module):
    """All that a caller needs to score outside: attention [L, A, T, T], states in the middle and after [L, T, D]."""

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
        """The same from Hugging Face's own modules, hooked where `output_attentions=True` gives no state."""
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
        """(ECS, PKS) by chunk from what came out, with torch, all tokens of a layer at a time."""
        attention, middle, after = map(torch.from_numpy, outputs)
        rows, inside = given["rows"], within(given["row_spans"], given["rows"].shape[1])
        final = self.base.normed(after[-1:])
        ecs, pks = [], []
        for layer in range(len(after)):
            chosen, _ = top_share(attention[layer, None, :, rows[0]], given["prompt_range"], PERCENT, LENGTHS[-1])
            ecs.append(resemblance(chosen, final, rows))
            seen, printed = (self.base.logits(states[layer, rows[0]]) for states in (middle, after))
            pks.append(divergence(seen, printed, "paper", False))
        ecs_BRH = torch.cat(ecs, 1).transpose(1, 2)
        return pooled(ecs_BRH, inside, True), pooled(torch.stack(pks, -1)[None], inside, True)

    def scores_by_token(self, outputs: list[np.ndarray], given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The same as the published code does it: token by token, head by head."""
        attention, middle, after = map(torch.from_numpy, outputs)
        rows, inside = given["rows"], within(given["row_spans"], given["rows"].shape[1])
        first, last = given["prompt_range"][0].tolist()
        final = self.base.normed(after[-1])
        count = max(1, (last - first) * PERCENT // 100)
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
    """CPU milliseconds end to end, in turns, and the bytes that leave the graph."""
    config = resolve_config({**CONFIG, "level": "token"})
    sizes = {**SIZES, "tokens": arguments.tokens, "rows": arguments.rows}
    made = draw_inputs(config, np.random.default_rng(0), sizes, {})
    given = {name: torch.from_numpy(values) for name, values in made.items()}
    detector = TokenDetector(config).eval()
    everything = Everything(detector.base).eval()
    names = [tensor.name for tensor in signature(config).outputs]
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        fused = _session(detector, tuple(given.values()), Path(folder, "fused.onnx"), list(made), names)
        dense = _session(
            everything,
            (given["token_ids"],),
            Path(folder, "dense.onnx"),
            ["token_ids"],
            ["attention", "middle", "after"],
        )
        ids = {"token_ids": made["token_ids"]}
        ways: dict[str, Callable[[], Any]] = {
            "fused": lambda: fused.run(None, made),
            "all attention, without scores": lambda: dense.run(None, ids),
            "all attention, scored at once": lambda: everything.scores_at_once(dense.run(None, ids), given),
            "Hugging Face eager, scored at once": lambda: everything.scores_at_once(everything.eagerly(given), given),
            "all attention, scored by token": lambda: everything.scores_by_token(dense.run(None, ids), given),
        }
        _same_scores(ways)
        times = _in_turns(ways, arguments.repeats)
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
    """Those that score say the same, or there is nothing to compare; of ECS all but one in a hundred, for near-ties."""
    found = {name: [np.asarray(part) for part in call()[:2]] for name, call in ways.items() if "without" not in name}
    for name, (ecs, pks) in found.items():
        wanted_ecs, wanted_pks = found["fused"]
        if np.quantile(np.abs(ecs - wanted_ecs), 0.99) > 1e-3 or np.abs(pks - wanted_pks).max() > 1e-5:
            raise InputError(f"expected the scores of 'fused' from '{name}', found others")


def _in_turns(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each way, measured one after the other and over again: what else runs here counts less."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, call in ways.items():
            started = time.process_time()
            call()
            samples[name].append(time.process_time() - started)
    return {name: float(np.median(values)) for name, values in samples.items()}


def bench_memory(arguments: Any) -> str:
    """Peak MiB above the loaded model, each length in a process of its own."""
    rows = []
    for tokens in LENGTHS:
        cells: list[Any] = [tokens]
        for way in ("chunk", "token", "dense"):
            if way == "dense" and tokens > arguments.longest_dense:
                cells.append("-")
                continue
            asked = [sys.executable, "-m", __spec__.name, "memory", "--one", way, "--tokens", str(tokens)]
            done = subprocess.run(asked, capture_output=True, text=True, check=False)
            cells.append(done.stdout.strip() if done.returncode == 0 else "out of memory")
        rows.append(cells)
    return table(["tokens", "by chunk, MiB", "by token, MiB", "output_attentions, MiB"], rows)


def measure_memory(way: str, tokens: int, answer: int) -> str:
    """MiB that one reading adds to the peak of this process."""
    config = resolve_config({**CONFIG, "level": "token" if way == "dense" else way})
    given = {
        name: torch.from_numpy(values)
        for name, values in draw_inputs(
            config, np.random.default_rng(0), {**SIZES, "tokens": tokens, "rows": answer}, {}
        ).items()
    }
    detector = (ChunkDetector if way == "chunk" else TokenDetector)(config).eval()
    with torch.inference_mode():
        if way == "dense":
            detector.base.model.set_attn_implementation("eager")
        before = peak_mib()
        if way == "dense":
            kept = detector.base.model.model(given["token_ids"], output_attentions=True, output_hidden_states=True)
            assert len(kept.attentions) == 8
        else:
            detector(**given)
    return f"{peak_mib() - before:.0f}"


def peak_mib() -> float:
    """The peak of this program's memory; getrusage would add that of the process which started it."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def bench_reading(arguments: Any) -> str:
    """Answers a CPU minute, the weights of the layers, and how far PKS moves."""
    config = resolve_config({**CONFIG, "max_tokens": 1024})
    examples = synthetic_examples(0, arguments.answers)
    exact: Any = None
    rows = []
    ways: dict[str, Config] = {
        "fp32, one at a time": {"padded_size": 1},
        "fp32, buckets of 8192 tokens": {},
        "fp32, compiled": {"compile": True},
        "bf16": {"loading": "bf16"},
        "int8": {"loading": "int8"},
        "nf4": {"loading": "nf4"},
    }
    for name, settings in ways.items():
        reader = FeatureReader(config, {**SETTINGS, **settings})
        reading = reader.reading(examples)
        reader.ask(reading.texts[:2])
        with Store(memory_entries=1 << 30) as store:
            started = time.process_time()
            fill(store, reading, reader.training["padded_size"])
            minutes = (time.process_time() - started) / 60
            pks = np.concatenate(store.namespace(reading.namespace, reading.identity).require(reading.texts, ""))[
                :, -8:
            ]
        exact = pks if exact is None else exact
        layers = reader.detector.base.model.model.layers
        size = sum(weight.numel() * weight.element_size() for weight in layers.parameters()) / 2**20
        moved = np.median(np.abs(pks - exact) / exact)
        rows.append((name, f"{len(examples) / minutes:.0f}", f"{size:.1f}", f"{moved:.1e}"))
    return table(["decoder", "answers/CPU min", "layers, MiB", "PKS moves (median)"], rows)


def bench_fitting(arguments: Any) -> str:
    """AUC, PCC and F1 on sources that were held out, by what is chosen on the rest."""
    if not arguments.scores:
        raise InputError("fitting: expected --scores FILE with a score log, found none")
    units = read_log(arguments.scores)
    labels = units.response_labels
    rows = []
    ways: dict[str, Config] = {
        "published settings": {"fit": "published"},
        "grid, ranked by AUC": {},
        "grid, ranked by mutual information": {"select": "mi"},
        "grid, ensemble of 5": {"ensemble": 5},
        "published settings, chunk length for PKS": {"fit": "published"},
    }
    for name, settings in ways.items():
        judged = length_for_pks(units) if "length" in name else units
        scores, called = fitting.held_out(judged, {**SETTINGS, **settings})
        found = fitting.measure(labels, scores, called)
        half = at_threshold(labels, scores >= 0.5)["f1"]
        rows.append((name, *(f"{value:.4f}" for value in (found["auc"], found["pcc"], found["f1"], half))))
    scorer = fitting.fit(units, SETTINGS)
    started = time.perf_counter()
    for _ in range(100):
        scorer.judge(units)
    per_call_ms = 10 * (time.perf_counter() - started)
    note = f"\n\nscoring {len(units.labels)} chunks: {per_call_ms:.2f} ms"
    return table(["held out by source", "AUC", "PCC", "F1", "F1 at 0.5"], rows) + note


def bench_cached(arguments: Any) -> str:
    """CPU milliseconds of requests of the published artifact, first and asked again."""
    rows = []
    with Store() as store, DetectorCache(arguments.repository, store) as cache:
        for sentences in (1, 2, 4, 10):
            cold: list[float] = []
            warm: list[float] = []
            for i in range(arguments.repeats):
                request = {
                    "prompt": f"Note {i}. " + "The bridge was opened in 1932. " * sentences,
                    "answer": "It was red.",
                }
                for times in (cold, *(warm,) * AGAIN):
                    started = time.process_time()
                    cache.answer([request])
                    times.append(time.process_time() - started)
            medians = [1e3 * float(np.median(times)) for times in (cold, warm)]
            rows.append((len(request["prompt"]), *(f"{ms:.3f}" for ms in medians), f"{medians[0] / medians[1]:.0f}"))
    return table(["characters of prompt", "first, CPU ms", "again, CPU ms", "ratio"], rows)


def bench_served(arguments: Any) -> str:
    """What each published precision says to made-up answers, beside fp32."""
    examples = synthetic_examples(77, arguments.answers)
    labels = np.array([int(bool(example.hallucinated)) for example in examples])
    rows, exact = [], np.empty(0)
    for precision in ("fp32", "int8", "int8_dynamic"):
        root = find(arguments.repository, artifact_name("hallucination", "onnx", precision))
        with open_runtime(root) as runtime:
            pipeline = open_pipeline(runtime.artifact, root)
            printed = [pipeline.decode(runtime.fresh(pipeline.encode([example.request])))[0] for example in examples]
        scores = np.array([answer["response_score"] for answer in printed])
        exact = scores if not len(exact) else exact
        threshold = printed[0]["threshold"]
        same = np.mean((scores >= threshold) == (exact >= threshold))
        moved = np.abs(scores - exact)
        rows.append(
            (precision, f"{auc(labels, scores):.4f}", f"{same:.3f}", f"{np.median(moved):.4f}", f"{moved.max():.3f}")
        )
    return table(["precision", "AUC", "same label", "score moves (median)", "(most)"], rows)


def bench_goals(arguments: Any) -> str:
    """What the detector is to reach, in one run."""
    named = {"fused": bench_fused, "memory": bench_memory, "cached": bench_cached, "fitting": bench_fitting}
    return "\n\n".join(f"{name}\n{bench(arguments)}" for name, bench in named.items())


BENCHES = {
    "goals": bench_goals,
    "fused": bench_fused,
    "memory": bench_memory,
    "reading": bench_reading,
    "fitting": bench_fitting,
    "cached": bench_cached,
    "served": bench_served,
}


@command
def main(argv: list[str] | None = None) -> int:
    """Print one table."""
    result = parser(
        "benchmarks.hallucination.bench",
        __doc__.partition(":")[0] + ".",
        "fused --tokens 512 --rows 128",
        "fitting --scores llama2_7b_chunk_scores_b.json",
    )
    result.add_argument("bench", choices=BENCHES, help="what to measure")
    result.add_argument("--tokens", type=int, default=512, help="tokens of prompt and answer (default: 512)")
    result.add_argument("--rows", type=int, default=128, help="tokens of the answer (default: 128)")
    result.add_argument("--repeats", type=int, default=9, help="how often (default: 9)")
    result.add_argument("--answers", type=int, default=48, help="answers to read (default: 48)")
    result.add_argument("--longest-dense", type=int, default=4096, help="tokens at most with all attention kept")
    result.add_argument("--one", choices=("chunk", "token", "dense"), help="memory: measure this once, in this process")
    result.add_argument("--scores", type=Path, help="score log, for fitting")
    result.add_argument("--repository", type=Path, default=Path("model_repository"), help="for cached and served")
    arguments = result.parse_args(argv)
    torch.set_num_threads(1)
    if arguments.one:
        print(measure_memory(arguments.one, arguments.tokens, arguments.rows))
    else:
        print(BENCHES[arguments.bench](arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a user would pick instead, beside Slipway's artifacts: one sentence embedder, one text, one interleaved run.

    python benchmarks/peers_cpu.py prepare --base FOLDER --out peers        # an embedder for everybody, and the text
    python benchmarks/peers_cpu.py run peers --repository model_repository --json peers.json

`make peers` makes the environments of the peers; those that are not there are left out, and said to be. Every variant
is one process that lives through the whole run; they take turns within each repeat. Times are end to end, from text to
unit vectors: 48 texts one by one (b1), and 256 texts in batches of 32 of about the same length (b32).
"""

import argparse
import ast
import json
import os
import random
import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve()
ROOT = HERE.parent.parent
SINGLE, SORTED, BATCH, NEIGHBOURS = 48, 256, 32, 10
ANSWERED, CALIBRATED, HELD_BACK = 512, 600, 1112
Embed = Callable[[list[str]], np.ndarray]


# --- the variants: each gives a function from texts, at most 32 of about one length, to unit vectors ------------------


def sentence_transformers(folder: Path, threads: int, **options: Any) -> Embed:
    from sentence_transformers import SentenceTransformer

    _torch_threads(threads)
    model = SentenceTransformer(str(folder / "embedder"), device="cpu", **options)
    return lambda texts: model.encode(texts, batch_size=BATCH, normalize_embeddings=True, show_progress_bar=False)


def compiled(folder: Path, threads: int) -> Embed:
    import torch
    from sentence_transformers import SentenceTransformer

    _torch_threads(threads)
    model = SentenceTransformer(str(folder / "embedder"), device="cpu")
    model[0].model = torch.compile(model[0].model, dynamic=True)  # .auto_model is a property: setting it does nothing
    return lambda texts: model.encode(texts, batch_size=BATCH, normalize_embeddings=True, show_progress_bar=False)


def raw_torch(folder: Path, threads: int, dynamic: bool = False) -> Embed:
    import torch

    _torch_threads(threads)
    module, tokens = _module(folder), _tokens(folder)
    if dynamic:
        module = torch.ao.quantization.quantize_dynamic(module, {torch.nn.Linear}, torch.qint8)

    def embed(texts: list[str]) -> np.ndarray:
        with torch.inference_mode():
            return module(*(torch.from_numpy(each) for each in tokens(texts).values())).numpy()

    return embed


def onnx_runtime(folder: Path, threads: int, int8: bool = False) -> Embed:
    """A careful user's own loop: eager attention, dynamo export, and quantize_dynamic for int8."""
    import onnxruntime

    path = _exported(folder)
    if int8:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        float_path, path = path, folder / "int8_dynamic.onnx"
        constants = {"MatMulConstBOnly": True}
        kinds = ["MatMul", "Gemm", "Gather"]
        quantize_dynamic(
            float_path, path, kinds, per_channel=True, weight_type=QuantType.QInt8, extra_options=constants
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    tokens = _tokens(folder)
    return lambda texts: session.run(None, tokens(texts))[0]


def openvino(folder: Path, threads: int, int8: str = "") -> Embed:
    """A careful user's own loop, with nncf's int8 of weights or, calibrated on 300 texts, of everything."""
    import openvino as ov

    tokens, core = _tokens(folder), ov.Core()
    model = core.read_model(_exported(folder))
    if int8:
        import nncf

        texts = json.loads((folder / "texts.json").read_text())["calibrate"][:300]
        if int8 == "weights":
            model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
        else:
            dataset = nncf.Dataset([tokens([text]) for text in texts])
            model = nncf.quantize(model, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=300)
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(model, "CPU", {**settings, "INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    return lambda texts: request.infer(tokens(texts), share_inputs=True)[0].copy()


def sentence_transformers_openvino_int8(folder: Path, threads: int) -> Embed:
    from sentence_transformers import SentenceTransformer, export_static_quantized_openvino_model

    texts = json.loads((folder / "texts.json").read_text())["calibrate"][:300]
    calibration = folder / "calibration"
    calibration.mkdir(exist_ok=True)
    (calibration / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    model = SentenceTransformer(str(folder / "embedder"), device="cpu", backend="openvino", model_kwargs=_ov(threads))
    quantized = folder / "embedder_openvino_int8"
    model.save_pretrained(str(quantized))
    export_static_quantized_openvino_model(
        model,
        quantization_config=None,
        model_name_or_path=str(quantized),
        dataset_name=str(calibration),
        dataset_config_name="default",
        dataset_split="train",
        column_name="text",
    )
    options = {**_ov(threads), "file_name": "openvino_model_qint8_quantized.xml"}
    model = SentenceTransformer(str(quantized), device="cpu", backend="openvino", model_kwargs=options)
    return lambda texts: model.encode(texts, batch_size=BATCH, normalize_embeddings=True, show_progress_bar=False)


def sentence_transformers_onnx(folder: Path, threads: int, kind: str = "") -> Embed:
    import onnxruntime
    from sentence_transformers import (
        SentenceTransformer,
        export_dynamic_quantized_onnx_model,
        export_optimized_onnx_model,
    )

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    settings = {"provider": "CPUExecutionProvider", "session_options": options}

    def opened(place: Path, **more: Any) -> Any:
        return SentenceTransformer(str(place), device="cpu", backend="onnx", model_kwargs=settings | more)

    model = opened(folder / "embedder")
    if kind:
        place = folder / f"embedder_onnx_{kind}"
        model.save_pretrained(str(place))
        if kind == "O3":
            export_optimized_onnx_model(model, "O3", str(place))
        else:
            export_dynamic_quantized_onnx_model(model, "avx512_vnni", str(place))
        model = opened(place, file_name=f"model_{'O3' if kind == 'O3' else 'qint8_avx512_vnni'}.onnx")
    return lambda texts: model.encode(texts, batch_size=BATCH, normalize_embeddings=True, show_progress_bar=False)


def slipway(folder: Path, threads: int, artifact: str = "") -> Embed:
    """A published artifact through its runtime and its pipeline, as `runtimes.predict` runs it."""
    sys.path.insert(0, str(ROOT))
    from runtimes.base import open_runtime
    from runtimes.pipeline import open_pipeline
    from runtimes.repository import find

    root = find(Path(os.environ["PEERS_REPOSITORY"]), artifact)
    runtime = open_runtime(root, threads=threads)
    runtime.open()
    pipeline = open_pipeline(runtime.artifact, root)
    name = runtime.signature.outputs[0].name
    return lambda texts: runtime.run(pipeline.encode([{"text": text} for text in texts]))[name]


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A way of running the embedder, and the environment that has its libraries."""

    venv: str
    start: Callable[[Path, int], Embed]
    int8: bool = False


def _with(function: Callable[..., Embed], **options: Any) -> Callable[[Path, int], Embed]:
    return lambda folder, threads: function(folder, threads, **options)


VARIANTS = {
    "sentence-transformers torch": Variant(venv=".venv-peers", start=sentence_transformers),
    "sentence-transformers torch, compiled": Variant(venv=".venv-peers", start=compiled),
    "torch loop": Variant(venv=".venv-peers", start=raw_torch),
    "torch loop, quantize_dynamic": Variant(venv=".venv-peers", start=_with(raw_torch, dynamic=True), int8=True),
    "onnxruntime loop": Variant(venv=".venv-peers", start=onnx_runtime),
    "onnxruntime loop, dynamic int8": Variant(venv=".venv-peers", start=_with(onnx_runtime, int8=True), int8=True),
    "openvino loop": Variant(venv=".venv-peers", start=openvino),
    "openvino loop, nncf int8 weights": Variant(venv=".venv-peers", start=_with(openvino, int8="weights"), int8=True),
    "openvino loop, nncf int8": Variant(venv=".venv-peers", start=_with(openvino, int8="all"), int8=True),
    "sentence-transformers onnx": Variant(venv=".venv-peers-optimum", start=sentence_transformers_onnx),
    "sentence-transformers onnx O3": Variant(
        venv=".venv-peers-optimum", start=_with(sentence_transformers_onnx, kind="O3")
    ),
    "sentence-transformers onnx int8": Variant(
        venv=".venv-peers-optimum", start=_with(sentence_transformers_onnx, kind="int8"), int8=True
    ),
    "sentence-transformers openvino int8": Variant(
        venv=".venv-peers-openvino", start=sentence_transformers_openvino_int8, int8=True
    ),
    "slipway onnx": Variant(venv=".venv", start=_with(slipway, artifact="statements_onnx")),
    "slipway onnx int8": Variant(venv=".venv", start=_with(slipway, artifact="statements_onnx_int8"), int8=True),
    "slipway openvino": Variant(venv=".venv", start=_with(slipway, artifact="statements_openvino")),
    "slipway openvino int8": Variant(
        venv=".venv", start=_with(slipway, artifact="statements_openvino_int8"), int8=True
    ),
}
BASE = next(iter(VARIANTS))


def _torch_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _ov(threads: int) -> dict[str, Any]:
    return {"ov_config": {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}}


def _tokens(folder: Path) -> Callable[[list[str]], dict[str, np.ndarray]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "embedder" / "tokenizer.json"))
    tokenizer.enable_truncation(256)
    tokenizer.enable_padding()

    def tokens(texts: list[str]) -> dict[str, np.ndarray]:
        encoded = tokenizer.encode_batch(texts)
        return {
            "input_ids": np.array([each.ids for each in encoded], np.int64),
            "attention_mask": np.array([each.attention_mask for each in encoded], np.int64),
        }

    return tokens


def _module(folder: Path) -> Any:
    """Encoder, mean, Dense and norm in one torch module, from the sentence-transformers folder."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel

    class Embedder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = AutoModel.from_pretrained(folder / "embedder", attn_implementation="eager")
            state = load_file(folder / "embedder" / "2_Dense" / "model.safetensors")
            self.dense = torch.nn.Linear(*state["linear.weight"].shape[::-1])
            self.dense.load_state_dict({name.removeprefix("linear."): value for name, value in state.items()})

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            mask = attention_mask.unsqueeze(-1).to(states.dtype)
            return torch.nn.functional.normalize(self.dense((states * mask).sum(1) / mask.sum(1)), dim=-1)

    return Embedder().eval()


def _exported(folder: Path) -> Path:
    import onnx
    import torch

    path = folder / f"exported-{os.getpid()}.onnx"
    batch, tokens = torch.export.Dim("batch", max=64), torch.export.Dim("tokens", max=256)
    example = tuple(torch.ones(2, 8, dtype=torch.int64) for _ in range(2))
    names = ["input_ids", "attention_mask"]
    with torch.no_grad():
        program = torch.onnx.export(
            _module(folder),
            example,
            dynamo=True,
            dynamic_shapes=({0: batch, 1: tokens},) * 2,
            input_names=names,
            opset_version=20,
            verbose=False,
        )
    program.save(path)
    model = onnx.load(path)
    del model.graph.value_info[:]  # those of initialisers stop quantize_dynamic
    onnx.save(model, path)
    return path


# --- one process of a variant ----------------------------------------------------------------------------------------


def work(folder: Path, name: str, threads: int) -> None:
    """Answer "b1", "b32" and "embed FILE" on stdin, one JSON line each."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not an answer
    texts = json.loads((folder / "texts.json").read_text())["answer"]
    embed = VARIANTS[name].start(folder, threads)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for task in map(str.split, iter(sys.stdin.readline, "")):
        started = time.perf_counter()
        if task[0] == "b1":
            for text in texts[:SINGLE]:
                embed([text])
        elif task[0] == "b32":
            for rows in batches([i for i in order if i < SORTED]):
                embed([texts[i] for i in rows])
        else:
            vectors = [(rows, embed([texts[i] for i in rows])) for rows in batches(order)]
            np.save(task[1], np.concatenate([each for _, each in vectors])[np.argsort(order)])
        answers.write(json.dumps(time.perf_counter() - started) + "\n")


def batches(order: Sequence[int]) -> Iterator[Sequence[int]]:
    yield from (order[start : start + BATCH] for start in range(0, len(order), BATCH))


# --- the run ---------------------------------------------------------------------------------------------------------


class Process:
    """A variant in a process of its own environment."""

    def __init__(self, folder: Path, name: str, threads: int, repository: Path) -> None:
        self.name = name
        python = ROOT / VARIANTS[name].venv / "bin" / "python"
        limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), str(threads))
        environment = {**os.environ, **limits, "PEERS_REPOSITORY": str(repository), "HF_HUB_OFFLINE": "1"}
        environment["TOKENIZERS_PARALLELISM"] = "false"
        self.log = (folder / f"{name.replace(' ', '_').replace(',', '')}.log").open("w")
        self.process = subprocess.Popen(
            [python, HERE, "work", folder, "--variant", name, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )

    def ask(self, task: str) -> float | None:
        """Seconds the task took, or None if the process has died."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(task, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            return None
        line = self.process.stdout.readline()
        return float(json.loads(line)) if line else None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


def run(folder: Path, repository: Path, threads: int, repeats: int) -> list[dict[str, Any]]:
    """One row for each variant that could be run: sentences a second, times as fast as the first, fidelity."""
    alive: list[Process] = []
    seconds: dict[str, dict[str, list[float]]] = {}
    vectors: dict[str, np.ndarray] = {}
    try:
        for name, each in VARIANTS.items():
            if not (ROOT / each.venv).is_dir():
                continue
            started = Process(folder, name, threads, repository)
            alive.append(started)
            answers = folder / f"{started.process.pid}.npy"
            if started.ask(f"embed {answers}") is None:
                alive.remove(started)
                print(f"left out: {name} failed, see {started.log.name}", file=sys.stderr)
                continue
            seconds[name], vectors[name] = {"b1": [], "b32": []}, np.load(answers)
        for repeat in range(repeats + 1):
            for task in ("b1", "b32"):
                for process in alive:
                    taken = process.ask(task)
                    if repeat and taken:  # the first is a warm-up
                        seconds[process.name][task].append(taken)
    finally:
        for process in alive:
            process.close()
    return [row(name, seconds, vectors) for name in seconds]


def row(name: str, seconds: dict[str, dict[str, list[float]]], vectors: dict[str, np.ndarray]) -> dict[str, Any]:
    found: dict[str, Any] = {"variant": name, "int8": VARIANTS[name].int8}
    for task, texts in (("b1", SINGLE), ("b32", SORTED)):
        own, base = np.array(seconds[name][task]), np.array(seconds[BASE][task])
        found[f"{task}_per_s"] = texts / float(np.median(own))
        found[f"{task}_times"] = float(np.median(base / own))
    one, other = vectors[name], vectors[BASE]
    found["cosine_min"] = float(((one * other).sum(1) / np.linalg.norm(one, axis=1)).min())
    near, wanted = nearest(one), nearest(other)
    found["top10"] = float(np.mean([len(set(a) & set(b)) / NEIGHBOURS for a, b in zip(near, wanted, strict=True)]))
    return found


def nearest(vectors: np.ndarray) -> np.ndarray:
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -np.inf)
    return np.argsort(-scores, 1)[:, :NEIGHBOURS]


# --- what everybody embeds -------------------------------------------------------------------------------------------


def prepare(base: Path, out: Path) -> None:
    """`out` holds the texts, and the embedder twice: as Slipway's checkpoint and as a sentence-transformers folder."""
    out.mkdir(parents=True, exist_ok=True)
    texts = sentences()
    parts = {"answer": texts[:ANSWERED], "calibrate": texts[ANSWERED:HELD_BACK]}
    (out / "texts.json").write_text(json.dumps(parts))
    papers = [
        {"arxiv_id": str(i), "title": "", "statements": [{"type": "text", "text": text} for text in pair]}
        for i, pair in enumerate(zip(parts["calibrate"][::2], parts["calibrate"][1::2], strict=True))
    ]
    (out / "papers.jsonl").write_text("".join(json.dumps(paper) + "\n" for paper in papers))
    settings = {"base": base, "pooling": "mean", "lora_targets": "query,key,value", "epochs": 0.1}
    options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "training.run", "statements", "--data", out / "papers.jsonl", *options]
    subprocess.run([*map(str, command), "--out", str(out / "checkpoints")], check=True, cwd=ROOT)
    save_sentence_transformers(out / "checkpoints" / "statements", base, out / "embedder")


def save_sentence_transformers(checkpoint: Path, base: Path, out: Path) -> None:
    """The checkpoint, its adapters merged, as sentence-transformers reads it: encoder, mean, Dense, norm."""
    sys.path.insert(0, str(ROOT))
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from export.source import Source
    from training.checkpoint import Checkpoint
    from training.spec import find_spec

    module = Source(find_spec("statements"), Checkpoint.load(checkpoint)).module
    module.base.save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    width_out, width_in = module.projection.weight.shape
    dense = {"in_features": width_in, "out_features": width_out, "bias": True}
    dense["activation_function"] = "torch.nn.modules.linear.Identity"
    kinds = ("Transformer", "Pooling", "Dense", "Normalize")
    folders = ("", "1_Pooling", "2_Dense", "3_Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(zip(folders, kinds, strict=True))
    ]
    for folder in folders[1:]:
        (out / folder).mkdir(exist_ok=True)
    pooling = {"word_embedding_dimension": width_in, "pooling_mode_mean_tokens": True}
    (out / "modules.json").write_text(json.dumps(modules))
    (out / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 256, "do_lower_case": False}))
    (out / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (out / "2_Dense" / "config.json").write_text(json.dumps(dense))
    state = {f"linear.{name}": value.contiguous() for name, value in module.projection.state_dict().items()}
    save_file(state, out / "2_Dense" / "model.safetensors")


def sentences() -> list[str]:
    """Sentences and paragraphs of the standard library's docstrings, in an order that is always the same."""
    found = set()
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted([*root.glob("*.py"), *root.glob("[!_]*/*.py")]):
        if any(part in path.parts for part in ("test", "tests", "idlelib", "site-packages", "dist-packages")):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                found |= {" ".join(each.split()) for each in (ast.get_docstring(node) or "").split("\n\n")}
    drawn, rng = set(), random.Random(0)
    for paragraph in sorted(found):
        pieces = [paragraph] if rng.random() < 0.12 else re.split(r"(?<=[.!?]) ", paragraph)
        drawn |= {piece for piece in pieces if 25 < len(piece) < 900 and ">>>" not in piece}
    texts = sorted(drawn)
    rng.shuffle(texts)
    return texts[:HELD_BACK]


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| variant | b1 /s | x | b32 /s | x | top-10 overlap | smallest cosine |", "|---|--:|--:|--:|--:|--:|--:|"]
    for each in rows:
        speed = (f"{each[f'{task}_per_s']:.0f} | {each[f'{task}_times']:.2f}" for task in ("b1", "b32"))
        lines.append(f"| {each['variant']} | {' | '.join(speed)} | {each['top10']:.3f} | {each['cosine_min']:.4f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["prepare", "run", "work"])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--base", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--variant", choices=VARIANTS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.do == "prepare":
        prepare(given.base.resolve(), given.out.resolve())
    elif given.do == "work":
        work(given.folder, given.variant, given.threads)
    else:
        rows = run(given.folder.resolve(), given.repository.resolve(), given.threads, given.repeats)
        print(as_table(rows))
        for left in sorted({each.venv for each in VARIANTS.values() if not (ROOT / each.venv).is_dir()}):
            print(f"left out, for there is no {left}: make peers")
        if given.json:
            given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

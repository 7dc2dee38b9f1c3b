"""The variants of one sentence embedder, and the process of one variant: variants.py FOLDER NAME THREADS

Each is a function from texts, at most 32 of about the same length, to unit vectors. A variant imports only the packages
of its environment.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SINGLE, SORTED, BATCH = 48, 256, 32
Embed = Callable[[list[str]], np.ndarray]


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


def onnx_runtime(folder: Path, threads: int, int8: str = "") -> Embed:
    """A loop of one's own: eager attention, dynamo export, and ONNX Runtime's own quantizers for int8."""
    import onnxruntime

    path = _exported(folder)
    if int8:
        float_path, path = path, folder / f"int8_{int8}.onnx"
        if int8 == "dynamic":
            _quantize_dynamic(float_path, path)
        else:
            _quantize_static(folder, float_path, path, symmetric=int8 == "static_symmetric")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    tokens = _tokens(folder)
    return lambda texts: session.run(None, tokens(texts))[0]


def _quantize_dynamic(float_path: Path, path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    constants = {"MatMulConstBOnly": True}
    kinds = ["MatMul", "Gemm", "Gather"]
    quantize_dynamic(float_path, path, kinds, per_channel=True, weight_type=QuantType.QInt8, extra_options=constants)


def _quantize_static(folder: Path, float_path: Path, path: Path, symmetric: bool) -> None:
    """Q/DQ with the largest value of each activation over 300 texts; symmetric scales are those that TensorRT takes."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    texts = json.loads((folder / "texts.json").read_text())["calibrate"][:300]
    tokens = _tokens(folder)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = (tokens([text]) for text in texts)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rows, None)

    prepared = folder / f"prepared-{os.getpid()}.onnx"
    quant_pre_process(float_path, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True, "ActivationSymmetric": symmetric},
    )


def openvino(folder: Path, threads: int, int8: str = "") -> Embed:
    """A loop of one's own, with nncf's int8 of weights or, calibrated on 300 texts, of weights and activations."""
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
    from runtimes.pipeline import open_pipeline
    from runtimes.repository import find
    from runtimes.runtime import open_runtime

    root = find(Path(os.environ["PEERS_REPOSITORY"]), artifact)
    runtime = open_runtime(root, threads=threads)
    runtime.open()
    pipeline = open_pipeline(runtime.artifact, root)
    name = runtime.signature.outputs[0].name
    return lambda texts: runtime.run(pipeline.encode([{"text": text} for text in texts]))[name]


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One variant, and the environment that has its libraries."""

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
    "onnxruntime loop, dynamic int8": Variant(venv=".venv-peers", start=_with(onnx_runtime, int8="dynamic"), int8=True),
    "onnxruntime loop, static int8": Variant(venv=".venv-peers", start=_with(onnx_runtime, int8="static"), int8=True),
    "onnxruntime loop, static symmetric int8": Variant(
        venv=".venv-peers", start=_with(onnx_runtime, int8="static_symmetric"), int8=True
    ),
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


def work(folder: Path, name: str, threads: int) -> None:
    """Answer "b1", "b32" and "embed FILE" on stdin, one JSON line each."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the output of libraries is not an answer
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


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the variant that the command line names, until standard input ends."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("folder", type=Path, help="folder of benchmarks.peers_cpu.prepare")
    result.add_argument("name", choices=VARIANTS, help="name of the variant")
    result.add_argument("threads", type=int, help="threads of the variant")
    arguments = result.parse_args(argv)
    work(arguments.folder, arguments.name, arguments.threads)


if __name__ == "__main__":
    main()

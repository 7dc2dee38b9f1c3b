"""Two models small enough to check by hand, as artifacts, and the pipeline they share.

`running`: y[t] = h + x[0] + ... + x[t], and h becomes h / 2 + the sum over x. `doubling`: y = 2 x, total = sum of y.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import runtimes
import runtimes.pipelines
from runtimes.artifact import ASSETS, Artifact, Facts, digests
from runtimes.errors import MissingPackage
from runtimes.tensors import Axis, Signature, TensorSpec
from runtimes.triton.server import TritonServer, find_bundle

WIDTH = 3
AXES = (Axis(name="batch", min=1, opt=2, max=8), Axis(name="time", min=1, opt=4, max=16))
X = TensorSpec(name="x", dtype="float32", shape=("batch", "time", WIDTH))
Y = TensorSpec(name="y", dtype="float32", shape=("batch", "time", WIDTH))
TOTAL = TensorSpec(name="total", dtype="float32", shape=("batch",))
STATE = tuple(TensorSpec(name=name, dtype="float32", shape=("batch", WIDTH)) for name in ("h", "h_next"))

RUNNING = Signature(inputs=(X, STATE[0]), outputs=(Y, STATE[1]), axes=AXES, state=(("h", "h_next"),))
DOUBLING = Signature(inputs=(X,), outputs=(Y, TOTAL), axes=AXES)

PIPELINE_SOURCE = """
import json
import numpy as np
from runtimes.errors import InputError
from runtimes.pipeline import Pipeline

class ToyPipeline(Pipeline):
    def encode(self, requests):
        for request in requests:
            if not isinstance(request, dict) or "x" not in request:
                raise InputError("expected a request with 'x', found none")
        return {"x": np.array([request["x"] for request in requests], np.float32) + self.config.get("offset", 0)}

    def decode(self, outputs):
        unit = json.loads((self.assets / "unit.json").read_text())
        return [{"last": row[-1].tolist(), "unit": unit, "note": "é"} for row in outputs["y"]]

    def example(self):
        return {"x": [[1.0, 2.0, 3.0]]}

PIPELINES = {"toy": ToyPipeline}
"""


def make(
    folder: Path,
    signature: Signature,
    *,
    key: str = "key",
    factor: float = 2.0,
    unit: object = "metre",
    **changes: object,
) -> Artifact:
    """An artifact in `folder`: the model of this signature, an asset for the pipeline, the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    graph = running_graph() if signature.state else doubling_graph(factor)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, folder / "model.onnx")
    (folder / ASSETS).mkdir(exist_ok=True)
    (folder / ASSETS / "unit.json").write_text(json.dumps(unit))
    described = {
        "model": "running" if signature.state else "doubling",
        "target": "onnx",
        "runtime": "onnxruntime",
        "precision": "fp32",
        "pipeline": "toy",
        "config": {},
        "signature": signature,
        "files": digests(folder),
        "built_with": {},
        "checkpoint": "0" * 64,
        "key": key,
        "facts": Facts(built=True, deserialized=True, ran=True, compared=True),
    }
    artifact = Artifact(**(described | changes))
    artifact.save(folder)
    return artifact


def running_graph() -> onnx.GraphProto:
    nodes = [
        helper.make_node("CumSum", ["x", "one"], ["sums"]),
        helper.make_node("Unsqueeze", ["h", "one"], ["h_wide"]),
        helper.make_node("Add", ["h_wide", "sums"], ["y"]),
        helper.make_node("ReduceSum", ["x", "time_axis"], ["sum"], keepdims=0),
        helper.make_node("Mul", ["h", "half"], ["h_half"]),
        helper.make_node("Add", ["h_half", "sum"], ["h_next"]),
    ]
    return helper.make_graph(nodes, "running", values(X, STATE[0]), values(Y, STATE[1]), constants(half=0.5))


def doubling_graph(factor: float) -> onnx.GraphProto:
    nodes = [
        helper.make_node("Mul", ["x", "factor"], ["y"]),
        helper.make_node("ReduceSum", ["y", "both_axes"], ["total"], keepdims=0),
    ]
    return helper.make_graph(nodes, "doubling", values(X), values(Y, TOTAL), constants(factor=factor))


def values(*specs: TensorSpec) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, spec.shape) for spec in specs]


def constants(**floats: float) -> list[onnx.TensorProto]:
    axes = {"one": np.int64(1), "time_axis": np.array([1]), "both_axes": np.array([1, 2])}
    every = axes | {name: np.float32(value) for name, value in floats.items()}
    return [numpy_helper.from_array(np.asarray(value), name) for name, value in every.items()]


def run_by_hand(x: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`running` as a loop: y and the next h for one row, x [time, width], h [width]."""
    y, total = np.empty_like(x), h.copy()
    for t, step in enumerate(x):
        total = total + step
        y[t] = total
    return y, h / 2 + (total - h)


@contextmanager
def known_pipeline(folder: Path) -> Iterator[None]:
    """Inside, this process knows the toys' pipeline, whose source it puts into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "toy.py").write_text(PIPELINE_SOURCE)
    runtimes.pipelines.__path__.append(str(folder))
    try:
        yield
    finally:
        runtimes.pipelines.__path__.remove(str(folder))
        sys.modules.pop("runtimes.pipelines.toy", None)


def checkout_with_pipeline(folder: Path) -> Path:
    """A copy of the package `runtimes` with the toy pipeline in it, for a process that starts anew."""
    source = Path(runtimes.__file__).parent
    shutil.copytree(source, folder / "runtimes", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "runtimes" / "pipelines" / "toy.py").write_text(PIPELINE_SOURCE)
    return folder


def no_server() -> str:
    """Why no Triton server can be started here, or empty."""
    try:
        if not shutil.which("tritonserver"):
            find_bundle()
    except MissingPackage as error:
        return str(error)
    return ""


def needs_server() -> list[pytest.MarkDecorator]:
    """Marks for a test file that starts a Triton server: slow, and skipped with the reason if there is none."""
    reason = no_server()
    return [pytest.mark.slow, pytest.mark.skipif(bool(reason), reason=reason)]


def ask(server: TritonServer, model: str, request: str | bytes) -> Any:
    """The answer of the ensemble `model` to one request in JSON."""
    http = pytest.importorskip("tritonclient.http")
    tensor = http.InferInput("request", [1, 1], "BYTES")
    sent = request.encode() if isinstance(request, str) else request
    tensor.set_data_from_numpy(np.array([[sent]], np.object_))
    with http.InferenceServerClient(server.http_url) as client:
        return json.loads(client.infer(model, [tensor]).as_numpy("answer").item())


def gone(pid: int | None) -> bool:
    """Neither alive nor a zombie."""
    return not Path(f"/proc/{pid}").exists()


def wait_for(happened: Callable[[], object], timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < end, f"expected this within {timeout_s} s"
        time.sleep(0.02)

"""What several test files share: untrained checkpoints, recorded data, and a model package that is not in the tree."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import training.models
from runtimes.engines.vllm import VllmRuntime
from runtimes.errors import MissingPackage
from runtimes.triton.server import TritonServer, find_bundle
from tests import small_decoders
from tests.exported import Exports, common_folder
from training.checkpoint import save_checkpoint
from training.spec import ModelSpec, all_specs, find_spec

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

TOY_MODEL = '''
"""A dense head over a frozen dense base that is read from a file."""

import torch
from safetensors.torch import load_file
from torch import nn

from runtimes.artifact import Check
from runtimes.tensors import Axis, Signature, TensorSpec
from training.spec import Frozen, Interface, ModelSpec, Parity, Tolerance


class Toy(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.base = nn.Linear(3, config["width"]).requires_grad_(False)
        self.base.load_state_dict(load_file(config["base"]))
        self.base_scale = nn.Parameter(torch.ones(config["width"]))  # trained, though its name begins like the base's
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(config["width"], 2)

    def forward(self, numbers):
        return (self.head(torch.tanh(self.base(numbers)) * self.base_scale) * self.gain,)


def signature(config):
    return Signature(
        inputs=(TensorSpec(name="numbers", dtype="float32", shape=("batch", 3)),),
        outputs=(TensorSpec(name="scores", dtype="float32", shape=("batch", 2)),),
        axes=(Axis(name="batch", min=1, opt=4, max=8),),
    )


def draw_inputs(config, rng, sizes, sample_inputs):
    return {"numbers": rng.normal(size=(sizes["batch"], 3)).astype("float32")}


def agreement(got, want, tolerance):
    same = float((got["scores"].argmax(-1) == want["scores"].argmax(-1)).mean())
    return {"same": Check(value=same, limit=1.0, at_least=True)}


SPECS = (
    ModelSpec(
        name="toy",
        pipeline="toy",
        presets={"tiny": {"width": 4, "base": "base.safetensors"}},
        interface=Interface(
            signature=signature,
            build=Toy,
            frozen=lambda config: (Frozen(prefix="base", source=config["base"], revision="1"),),
        ),
        parity=Parity(
            draw_inputs=draw_inputs,
            agreement=agreement,
            tolerance={"fp32": Tolerance(absolute=1e-6, relative=1e-6)},
        ),
    ),
)
'''


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """What tests start can be interrupted; a job in the background of a shell and its children ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of recorded data; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("SLIPWAY_DATA", Path(__file__).parents[1] / "../shared/data"))
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}; set SLIPWAY_DATA")
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained, seeded checkpoint of every model in its tiny preset."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for spec in all_specs().values():
        if spec.trained:
            write_untrained(spec, folder / spec.name, {})
    return folder


@pytest.fixture(scope="session")
def exports(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Every artifact of the untrained checkpoints, made when a test first asks for it."""
    return Exports(common_folder(tmp_path_factory) / "exports", checkpoints)


@pytest.fixture(scope="session")
def statements_repository(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with the untrained statements model, exported to ONNX."""
    return exports.onnx(tmp_path_factory.mktemp("statements") / "model_repository", "statements")


@pytest.fixture(scope="session")
def gru_repository(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with an untrained policy_gru, exported to ONNX; tests copy it before they change it."""
    return exports.onnx(tmp_path_factory.mktemp("gru") / "model_repository", "policy_gru")


@pytest.fixture
def started_pids(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The processes that a test starts from now on."""
    started: list[int] = []
    popen = subprocess.Popen

    def remember(*arguments: Any, **options: Any) -> Any:
        process = popen(*arguments, **options)
        started.append(process.pid)
        return process

    monkeypatch.setattr(subprocess, "Popen", remember)
    return started


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[TritonServer]:
    """A real Triton on the test file's own `repository`; skipped with the reason where there is none."""
    try:
        find_bundle()
    except MissingPackage as error:
        pytest.skip(str(error))
    with TritonServer(repository) as running:
        yield running


@pytest.fixture(scope="session")
def vllm_generator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[VllmRuntime, "LlamaForCausalLM"]]:
    """A small Llama in vLLM and in transformers."""
    folder = tmp_path_factory.mktemp("vllm") / "generator"
    module = small_decoders.make_generator(folder)
    with small_decoders.opened(folder) as runtime:
        yield runtime, module


@pytest.fixture(scope="session")
def vllm_embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[VllmRuntime, small_decoders.Embedder]]:
    """A small Qwen2 with pooling and projection, in vLLM and in torch."""
    folder = tmp_path_factory.mktemp("vllm") / "embedder"
    module = small_decoders.make_embedder(folder)
    with small_decoders.opened(folder) as runtime:
        yield runtime, module


@pytest.fixture
def toy_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelSpec]:
    """A model package with a frozen part, found in a folder that is not in the tree."""
    package = tmp_path / "more_models" / "toy"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(TOY_MODEL)
    monkeypatch.setattr(training.models, "__path__", [*training.models.__path__, str(package.parent)])
    yield find_spec("toy")
    del sys.modules["training.models.toy"]


def write_untrained(spec: ModelSpec, folder: Path, changes: Mapping[str, object]) -> torch.nn.Module:
    """Save an untrained module of the tiny preset, changed so, as a checkpoint; the module."""
    torch.manual_seed(0)
    config = {**spec.preset("tiny"), **changes}
    module = spec.interface.build(config).eval()
    sizes = spec.interface.signature(config).sizes("opt")
    sample_inputs = spec.parity.draw_inputs(config, np.random.default_rng(0), sizes, {})
    save_checkpoint(
        folder,
        spec,
        module,
        preset="tiny",
        config=config,
        training={},
        step=7,
        metrics={"nats": 1.5},
        sample_inputs=sample_inputs,
    )
    return module

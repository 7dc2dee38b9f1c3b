"""OpenVINO: the second served engine, added as two files; in this process and on a real Triton."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from export import all as export_all
from export import parity
from export.source import Source
from export.targets.openvino import convert
from runtimes.errors import EngineError
from runtimes.repository import find
from runtimes.runtime import open_runtime
from runtimes.triton.server import TritonServer
from tests.export.test_lowering import OfModule
from tests.toys import needs_server
from training.checkpoint import Checkpoint
from training.spec import find_spec

pytest.importorskip("openvino")
MODEL = "policy_gru"  # carries a state


@pytest.fixture(scope="module")
def repository(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("openvino") / "model_repository"
    arguments = ["--target", "openvino", "--model", MODEL, "--checkpoints", str(checkpoints)]
    assert export_all.main([*arguments, "--repository", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def root(repository: Path) -> Path:
    return find(repository, f"{MODEL}_openvino")


@pytest.fixture(scope="module")
def source(checkpoints: Path) -> Source:
    return Source(find_spec(MODEL), Checkpoint.load(checkpoints / MODEL))


def test_only_openvinos_own_format_is_published(root: Path) -> None:
    assert {"model.xml", "model.bin"} <= {path.name for path in root.iterdir()}
    assert not list(root.glob("*.onnx"))


def test_a_later_call_leaves_an_earlier_answer_alone(root: Path, source: Source) -> None:
    rng = np.random.default_rng(0)
    one, other = (source.draw_inputs(rng, source.signature.sizes("opt")) for _ in range(2))
    with open_runtime(root) as runtime:
        first = runtime.fresh(one)
        kept = {name: array.copy() for name, array in first.items()}
        second = runtime.fresh(other)
    name = source.signature.visible_outputs[0].name
    assert np.array_equal(first[name], kept[name])
    assert not np.array_equal(first[name], second[name])


def test_calls_of_several_threads_get_their_own_answers(root: Path, source: Source) -> None:
    rng = np.random.default_rng(0)
    inputs = [source.draw_inputs(rng, source.signature.sizes("opt")) for _ in range(4)]
    name = source.signature.visible_outputs[0].name
    with open_runtime(root) as runtime, ThreadPoolExecutor(4) as pool:
        want = [runtime.fresh(each)[name] for each in inputs]
        for _ in range(50):
            for got, alone in zip(pool.map(runtime.fresh, inputs), want, strict=True):
                np.testing.assert_array_equal(got[name], alone)


def test_the_engine_says_what_runs_it_and_refuses_what_it_has_not(root: Path) -> None:
    with open_runtime(root) as runtime:
        assert runtime.provider == "CPU"
    with pytest.raises(EngineError, match="engine openvino: expected a device of cpu here, found 'cuda'"):
        open_runtime(root, device="cuda").open()


def test_a_damaged_model_is_one_line(root: Path, tmp_path: Path) -> None:
    for name in ("artifact.json", "model.bin"):
        (tmp_path / name).write_bytes((root / name).read_bytes())
    (tmp_path / "model.xml").write_text("<net>")
    with pytest.raises(EngineError, match=r"openvino cannot open .*model\.xml") as caught:
        open_runtime(tmp_path, verify=False).open()
    assert "\n" not in str(caught.value)


class Determinant(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.det(x[:, :1].mT @ x[:, :1])[:, None, None]


def test_an_operator_that_openvino_has_not_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"openvino cannot convert the model: .*Det"):
        convert(OfModule(Determinant()), "fp32", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("_", [pytest.param(None, marks=needs_server())])
def test_parity_holds_through_tritons_openvino_backend(_: None, repository: Path, root: Path, source: Source) -> None:
    assert 'backend: "openvino"' in (root.parent / "config.pbtxt").read_text()
    with TritonServer(repository) as server, open_runtime(root, engine="triton", url=server.grpc_url) as runtime:
        checks = parity.check_parity(runtime, source, "fp32")
    parity.require_passed(checks)
    assert any(name.startswith("rollout_") for name in checks)

"""A program file gives its graph and tensors, and nothing in it is unpickled, evaluated or called beside operators."""

import contextlib
import copy
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.export.pt2_archive import PT2ArchiveReader, PT2ArchiveWriter, constants

from runtimes.artifact import Artifact, digests
from runtimes.engines import _torch_program as torch_program
from runtimes.engines._torch_program import EXAMPLE, GRAPH, is_arithmetic
from runtimes.engines.torch import PROGRAM_FILE
from runtimes.errors import ArtifactError
from runtimes.runtime import open_runtime
from tests.toys import DOUBLING, make

WEIGHTS, CONSTANTS = torch_program.TENSORS
NO_OPAQUE_OBJECTS = not hasattr(constants, "OPAQUE_OBJ_FILENAME_PREFIX")  # torch 2.11 has none
Records = dict[str, bytes]


class Doubling(nn.Module):
    """The toy of that name, with a weight and a constant to be exchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x * self.factor + torch.tensor([0.0])
        return y, y.flatten(1).sum(1)


class Mark:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def pickled(mark: Path) -> bytes:
    stream = io.BytesIO()
    torch.save((Mark(mark),), stream)
    return stream.getvalue()


def touching(mark: Path) -> str:
    return f"__import__('pathlib').Path('{mark}').touch()"


@pytest.fixture(scope="module")
def traced() -> torch.export.ExportedProgram:
    batch, time = torch.export.Dim("batch", min=1, max=8), torch.export.Dim("time", min=1, max=16)
    return torch.export.export(Doubling(), (torch.ones(2, 4, 3),), dynamic_shapes=({0: batch, 1: time},), strict=False)


@pytest.fixture
def artifact(traced: torch.export.ExportedProgram, tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    make(folder, DOUBLING, target="torch", runtime="torch")
    (folder / "model.onnx").unlink()
    torch_program.save(traced, folder / PROGRAM_FILE)
    sign(folder)
    return folder


def sign(folder: Path) -> None:
    """The manifest lists the files as they are."""
    replace(Artifact.load(folder), files=digests(folder)).save(folder)


def exchange(folder: Path, change: Callable[[Records], None]) -> Path:
    """The program's archive is written anew after a change to its records."""
    path = folder / PROGRAM_FILE
    reader = PT2ArchiveReader(str(path))
    records = {name: reader.read_bytes(name) for name in reader.get_file_names() if not name.startswith(".data/")}
    change(records)
    records.pop("byteorder")  # the writer has one of its own
    with PT2ArchiveWriter(str(path)) as writer:
        for name, content in records.items():
            writer.write_bytes(name, content)
    sign(folder)
    return path


def listed(records: Records, listing: str, **changes: object) -> str:
    """What the first tensor of a listing is called, after a change of its description."""
    tensors = json.loads(records[listing])
    first = next(iter(tensors["config"].values()))
    first.update(changes)
    records[listing] = json.dumps(tensors).encode()
    return str(first["path_name"])


def in_graph(records: Records, old: str, new: str) -> None:
    """In the graph one text stands for another, wherever it stands."""
    text = json.dumps(json.loads(records[GRAPH]))
    assert json.dumps(old) in text
    records[GRAPH] = text.replace(json.dumps(old), json.dumps(new)).encode()


def example_inputs(records: Records, mark: Path) -> None:
    records[EXAMPLE] = pickled(mark)


def pickled_weight(records: Records, mark: Path) -> None:
    records["data/weights/" + listed(records, WEIGHTS, use_pickle=True)] = pickled(mark)


def pickled_constant(records: Records, mark: Path) -> None:
    records["data/constants/" + listed(records, CONSTANTS, use_pickle=True)] = pickled(mark)


def opaque_object(records: Records, mark: Path) -> None:
    listed(records, CONSTANTS, use_pickle=True, path_name="opaque_obj_0", tensor_meta=None)
    records["data/constants/opaque_obj_0"] = pickle.dumps(Mark(mark))


def old_weights(records: Records, mark: Path) -> None:
    records["data/weights/model.pt"] = pickled(mark)


def old_constants(records: Records, mark: Path) -> None:
    records["data/constants/model.pt"] = pickled(mark)


def second_model(records: Records, mark: Path) -> None:
    records["models/a.json"], records["data/sample_inputs/a.pt"] = records[GRAPH], pickled(mark)
    records["data/weights/a_weights_config.json"] = records[WEIGHTS]
    records["data/constants/a_constants_config.json"] = records[CONSTANTS]


def size(records: Records, mark: Path) -> None:
    graph = json.loads(records[GRAPH])
    x = graph["graph_module"]["graph"]["tensor_values"]["x"]
    in_graph(records, x["sizes"][0]["as_expr"]["expr_str"], touching(mark))


def name_in_source(records: Records, mark: Path) -> None:
    in_graph(records, "x", f"x={touching(mark)}")


def operator_on_a_file(records: Records, mark: Path) -> None:
    graph = json.loads(records[GRAPH])
    node = graph["graph_module"]["graph"]["nodes"][0]
    given = {"filename": {"as_string": str(mark)}, "shared": {"as_bool": True}, "size": {"as_int": 3}}
    inputs = [{"name": name, "arg": value, "kind": 2} for name, value in given.items()]
    node |= {"target": "torch.ops.aten.from_file.default", "inputs": inputs}
    records[GRAPH] = json.dumps(graph).encode()


def module_to_import(records: Records, mark: Path) -> None:
    (mark.parent / "imported.py").write_text(touching(mark))
    tree = {"type": "collections.defaultdict", "children_spec": []}
    tree["context"] = {"default_factory_module": "imported", "default_factory_name": "none", "dict_context": "[]"}
    signature = json.loads(records[GRAPH])["graph_module"]["module_call_graph"][0]["signature"]
    in_graph(records, signature["in_spec"], json.dumps([1, tree]))


ATTACKS = [
    example_inputs,
    pickled_weight,
    pickled_constant,
    pytest.param(opaque_object, marks=pytest.mark.skipif(NO_OPAQUE_OBJECTS, reason="this torch knows no such objects")),
    old_weights,
    old_constants,
    second_model,
    size,
    name_in_source,
    operator_on_a_file,
    module_to_import,
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_torch_would_run_is_refused_unrun(
    attack: Callable[[Records, Path], None], artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    mark = tmp_path / "mark"
    path = exchange(artifact, lambda records: attack(records, mark))
    refused(artifact)
    assert not mark.exists()
    let_torch_run(path)
    assert mark.exists(), "refusing this shows nothing: torch does not run it"


def test_the_format_of_torch_2_7_is_refused_unrun(artifact: Path, tmp_path: Path) -> None:
    path, mark = artifact / PROGRAM_FILE, tmp_path / "mark"
    graph = PT2ArchiveReader(str(path)).read_bytes(GRAPH)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("version", "8.8")
        archive.writestr("serialized_exported_program.json", graph)
        for name in ("state_dict", "constants", "example_inputs"):
            archive.writestr(f"serialized_{name}.pt", pickled(mark))
    sign(artifact)
    refused(artifact)
    assert not mark.exists()
    let_torch_run(path)
    assert mark.exists()


@pytest.mark.parametrize("name", ["data/aotinductor/model/a.so", "extra/a.txt", "executorch/a", "models/b.json"])
def test_a_record_of_another_kind_is_refused(name: str, artifact: Path) -> None:
    exchange(artifact, lambda records: records.update({name: b"{}"}))
    assert name in refused(artifact)


def test_a_program_with_its_example_inputs_must_be_exported_again(
    traced: torch.export.ExportedProgram, artifact: Path
) -> None:
    whole = copy.deepcopy(traced)
    whole.example_inputs = ((torch.ones(2, 4, 3),), {})
    torch.export.save(whole, artifact / PROGRAM_FILE)
    sign(artifact)
    assert "bytes of example inputs" in refused(artifact)


@pytest.mark.parametrize("content", [b"", b"no archive"])
def test_what_is_no_program_is_an_error_of_one_line(content: bytes, artifact: Path) -> None:
    (artifact / PROGRAM_FILE).write_bytes(content)
    sign(artifact)
    assert PROGRAM_FILE in refused(artifact)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_answers_are_those_of_the_program_that_was_saved(
    compiled: bool, traced: torch.export.ExportedProgram, artifact: Path
) -> None:
    x = np.random.default_rng(0).normal(size=(3, 5, 3)).astype(np.float32)
    with torch.inference_mode():
        want = traced.module()(torch.from_numpy(x))
    with open_runtime(artifact, compiled=compiled) as runtime:
        got = runtime.run({"x": x})
    assert PT2ArchiveReader(str(artifact / PROGRAM_FILE)).read_bytes(EXAMPLE) == b""
    np.testing.assert_array_equal(got["y"], want[0].numpy())
    if compiled:  # which adds in another order
        np.testing.assert_allclose(got["total"], want[1].numpy(), rtol=1e-5)
    else:
        np.testing.assert_array_equal(got["total"], want[1].numpy())


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s29', positive=True, integer=True)",
        "FloorDiv(Add(Mul(Integer(-2), Symbol('u0', integer=True)), Integer(127)), Integer(64))",
        "Max(Integer(1), Pow(Symbol('s3', integer=True), Integer(-1)))",
        "Float('0.5', precision=53)",
    ],
)
def test_a_size_is_arithmetic(text: str) -> None:
    assert is_arithmetic(text)


@pytest.mark.parametrize(
    "text",
    [
        "exec('s1')",
        "Symbol.mro()",
        "Max('exit()', Integer(1))",
        "Add(*Symbol)",
        "[Integer(1)][0]",
        "lambda: Integer(1)",
        "Integer(1) if Integer(1) else Integer(1)",
        "Integer(1); Integer(2)",
        "Symbol(b's1')",
        "\uff33ymbol('s1')",
        "",
    ],
)
def test_what_is_more_than_arithmetic_is_no_size(text: str) -> None:
    assert not is_arithmetic(text)


def refused(artifact: Path) -> str:
    """How the runtime refuses to open the artifact: in one line with a remedy."""
    with pytest.raises(ArtifactError, match="export it again") as caught, open_runtime(artifact):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def let_torch_run(path: Path) -> None:
    """What torch alone makes of a program, until it fails."""
    with contextlib.suppress(Exception):
        program = torch.export.load(path)
        program.graph_module(*program.parameters(), *program.constants.values(), torch.ones(2, 4, 3))

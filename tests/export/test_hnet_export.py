"""What is exported of an H-Net is the H-Net: its forms agree, and what converted models are held to would notice."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from export import all as export_all
from export import parity
from export.source import Source
from runtimes.errors import ParityError
from runtimes.repository import find
from runtimes.runtime import CarriedStream, open_runtime
from tests.conftest import write_untrained
from tests.training.models.hnet.test_hnet_model import ARCHS, model, texts
from training.checkpoint import Checkpoint
from training.layers.scan import Form, decayed_sums, scan_form
from training.models.hnet.agreement import agreement, mask_near_ties
from training.models.hnet.arch import state_shapes
from training.models.hnet.serving import HNetScorer, HNetStep
from training.spec import Tolerance, find_spec

FORMS = [Form(kind="operator"), Form(kind="doubling", length=70)]
TOLERANCE = Tolerance(absolute=1e-4, relative=1e-4)
every_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.kind)


@every_form
@pytest.mark.parametrize("name", ARCHS)
def test_a_text_is_the_same_in_every_form(name: str, form: Form) -> None:
    module, ids, lengths = model(name), texts(3, 70), torch.tensor([70, 33, 1])
    want = module(ids, lengths)
    with scan_form(form):
        got = module(ids, lengths)
    for printed, meant in zip(got, want, strict=True):
        torch.testing.assert_close(printed, meant, rtol=2e-5, atol=2e-5)


@every_form
@pytest.mark.parametrize("name", ["one stage", "two stages", "SSM inside, attention outside"])
def test_a_step_is_the_same_in_every_form(name: str, form: Form) -> None:
    """Rows with and without a boundary are in one batch: the traced form runs for all and keeps what did not move."""
    module = HNetStep(model(name))
    state = again = tuple(module.hnet.zero_state(3).values())
    boundaries = []
    for byte_ids in texts(3, 12).split(1, 1):
        *want, _ = printed = module(byte_ids, *state)
        with scan_form(form):
            *got, _ = repeated = module(byte_ids, *again)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)
        state, again = printed[3:], repeated[3:]
        boundaries.append(printed[2][:, 0, 0])
    counts = torch.stack(boundaries).sum(1)
    assert 0 < counts[1:].min() < 3 or 0 in counts


@pytest.mark.parametrize("time", [1, 63, 64, 65, 200])
def test_pieces_at_once_are_the_loop(time: int) -> None:
    rng = torch.Generator().manual_seed(time)
    shapes = [(2, time, 3, 8), (2, time, 3), (2, time, 4), (2, time, 4), (2, 3, 8, 4)]
    x, decay, into, out, state = (torch.randn(shape, generator=rng) for shape in shapes)
    printed = {}
    for kind in ("loop", "operator", "doubling"):
        with scan_form(Form(kind=kind)):  # type: ignore[arg-type]
            printed[kind] = decayed_sums(x, -decay.abs(), into, out, state)
    for kind in ("operator", "doubling"):
        for one, other in zip(printed[kind], printed["loop"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_cost_of_a_byte_is_that_of_cross_entropy() -> None:
    module, ids, lengths = model("one stage"), texts(2, 20), torch.tensor([20, 9])
    logits, *_, nats, again = HNetScorer(module)(ids, lengths)
    want = torch.nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
    torch.testing.assert_close(nats[0, 1:], want[0])
    torch.testing.assert_close(nats[1, 1:9], want[1, :8])
    assert not nats[:, 0].any()
    assert not nats[1, 9:].any()
    assert torch.equal(again[0], ids[0])
    assert (again[1, 9:] == -1).all()


def test_the_state_of_the_step_is_that_of_the_model() -> None:
    spec = find_spec("hnet_step")
    for config in spec.presets.values():
        signature = spec.interface.signature(config)
        shapes = {tensor.name: tensor.shape[1:] for tensor in signature.inputs[1:]}
        assert shapes == {f"{name}_in": shape for name, shape in state_shapes(config).items()}
        assert len(signature.state) == len(shapes)


# What a converted model is held to


def outputs(p: float, time: int = 300, nats: float = 1.0) -> dict[str, np.ndarray]:
    """One row, p of a boundary in its middle."""
    likely = np.full((1, time, 1), 0.9, np.float32)
    likely[0, time // 2] = p
    return {
        "logits": np.zeros((1, time, 256), np.float32),
        "boundary_prob": likely,
        "boundary": likely >= 0.5,
        "nats": np.full((1, time), nats, np.float32),
        "text_bytes": np.full((1, time), 97),
    }


def failed(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> set[str]:
    return {name for name, check in agreement(got, want, TOLERANCE).items() if not check.passed}


def test_a_near_tie_may_fall_either_way_and_its_row_is_compared_up_to_there() -> None:
    got, want = outputs(0.49999), outputs(0.50001)
    got["logits"][0, 200], got["logits"][0, 20] = 7, 5
    assert not failed(got, want)
    printed = mask_near_ties(got, want, TOLERANCE)
    assert not printed["logits"][0, 150:].any()
    assert (printed["logits"][0, 20] == 5).all()


def test_a_boundary_that_is_no_near_tie_may_not_differ() -> None:
    got, want = outputs(0.45), outputs(0.55)
    assert failed(got, want) == {"clear"}
    assert (mask_near_ties(got, want, TOLERANCE)["boundary"] == got["boundary"]).all()


def test_too_many_near_ties_other_bits_and_no_numbers_are_noticed() -> None:
    want, got = outputs(0.5), outputs(0.5)
    want["boundary_prob"][:], got["boundary_prob"][:] = 0.5, 0.49999
    got["boundary"] = got["boundary_prob"] >= 0.5
    assert failed(got, want) == {"boundaries"}
    assert failed(outputs(0.9, nats=1.02), outputs(0.9)) == {"bits"}
    assert "clear" in failed(outputs(np.nan), outputs(0.9))
    assert "bits" in failed(outputs(0.9, nats=np.nan), outputs(0.9))


# Artifacts


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    change = {"model_arch": "m1 t1 m1t1", "model_dim": "64 64 128", "attention_window": 9, "attention_capacity": 5}
    write_untrained(find_spec("hnet"), folder / "checkpoints" / "hnet", change)
    return folder


@pytest.fixture(scope="module")
def two_stage_repository(two_stages: Path) -> Path:
    folder = two_stages / "model_repository"
    arguments = ["--target", "onnx", "--model", "hnet", "--model", "hnet_step"]
    places = ["--checkpoints", str(two_stages / "checkpoints"), "--repository", str(folder)]
    assert export_all.main([*arguments, *places]) == 0
    return folder


def branches(graph: onnx.GraphProto) -> dict[str, onnx.GraphProto]:
    """The branches of the one If of a graph."""
    (node,) = [node for node in graph.node if node.op_type == "If"]
    return {attribute.name: attribute.g for attribute in node.attribute}


@pytest.mark.slow
def test_each_stage_of_a_step_is_an_if_in_that_of_the_stage_around_it(two_stage_repository: Path) -> None:
    outer = branches(onnx.load(find(two_stage_repository, "hnet_step_onnx") / "model.onnx").graph)
    inner = branches(outer["then_branch"])
    assert {"Gemm", "MatMul"} & {node.op_type for node in inner["then_branch"].node}
    for skipped in (outer["else_branch"], inner["else_branch"]):
        work = {node.op_type for node in skipped.node} - {"Identity", "ConstantOfShape", "Constant", "Shape", "Expand"}
        assert not work - {"Cast", "Concat", "Unsqueeze", "Reshape"}
        assert sum(node.op_type == "Identity" for node in skipped.node) > 1


@pytest.mark.slow
def test_rings_written_in_place_have_the_outputs_of_copied_ones(two_stage_repository: Path) -> None:
    """Rings of 5 and 10 places go round; a row is reset, one goes and two come."""
    ids = texts(4, 80).numpy()
    with open_runtime(find(two_stage_repository, "hnet_step_onnx")) as runtime:
        bound, copied = runtime.stream(3), CarriedStream(runtime, 3)
        assert type(bound) is not CarriedStream
        for t in range(80):
            if t == 30:
                bound.reset([1])
                copied.reset([1])
            if t == 50:
                bound.choose([2, 0, None, None])
                copied.choose([2, 0, None, None])
            inputs = {"byte_ids": ids[: 3 if t < 50 else 4, t : t + 1]}
            got, want = bound.step(inputs), copied.step(inputs)
            for name in want:
                np.testing.assert_array_equal(got[name], want[name])
        assert runtime.signature.in_place
        for name, array in copied.state.items():
            np.testing.assert_array_equal(bound.state[name], array)


@pytest.mark.slow
def test_a_step_that_forgets_a_state_is_not_published(two_stages: Path) -> None:
    source = Source(find_spec("hnet_step"), Checkpoint.load(two_stages / "checkpoints" / "hnet"))

    class Forgetful:
        """A step whose average of chunks stays zero."""

        signature = source.signature

        def fresh(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {**source.answer(inputs)}

        def stream(self, batch: int) -> Any:
            state = source.signature.zero_state(batch)

            class Stream:
                def step(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
                    arguments = [
                        torch.from_numpy({**inputs, **state}[tensor.name]) for tensor in source.signature.inputs
                    ]
                    with torch.no_grad():
                        printed = dict(
                            zip([t.name for t in source.signature.outputs], source.module(*arguments), strict=True)
                        )
                    state.update({one: printed.pop(other).numpy() for one, other in source.signature.state})
                    state["average_in"][:] = 0
                    return {name: tensor.numpy() for name, tensor in printed.items()}

                def reset(self, rows: list[int]) -> None:
                    for array in state.values():
                        array[rows] = 0

                def close(self) -> None:
                    pass

            return Stream()

    with pytest.raises(ParityError, match="rollout_"):
        parity.require_passed(parity.check_parity(Forgetful(), source, "fp32"))  # type: ignore[arg-type]

"""Export: every published artifact is verified, every cell has an artifact or a reason, a failure stops no other."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from export import all as export_all
from export import parity
from export.calibration_texts import CalibrationTexts
from export.convert import Cell, why_skipped
from export.source import LastSource, Source
from export.targets import onnx as onnx_target
from runtimes import plugins
from runtimes.artifact import Artifact
from runtimes.errors import ParityError
from runtimes.host.cli import program
from runtimes.repository import newest, published
from runtimes.runtime import open_runtime
from tests.exported import Exports
from training.checkpoint import MANIFEST, Checkpoint, save_checkpoint
from training.spec import all_specs, find_spec

MODEL = "policy_gru"
TARGETS = [name for name in plugins.names("export.targets") if name != "vllm"]  # that one: test_vllm_export.py


@pytest.fixture
def run(checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[Any]]]:
    """Run export.all into a repository of this test; gives the exit status and the cells."""

    def call(*arguments: str, source: Path = checkpoints) -> tuple[int, list[Any]]:
        capsys.readouterr()
        places = ["--checkpoints", str(source), "--repository", str(tmp_path / "repository"), "--json"]
        status = export_all.main([*arguments, *places])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return status, json.loads(printed.out)["cells"] if printed.out else []

    return call


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("model", sorted(all_specs()))
def test_every_model_fills_its_cell_or_has_a_reason(model: str, target: str, exports: Exports) -> None:
    cell = exports.cells(model, TARGETS)[target]
    if cell["status"] == "skipped":
        assert cell["reason"]
        return
    assert cell["status"] == "ok", cell["reason"]
    assert Path(cell["artifact"], "artifact.json").is_file()
    assert cell["bytes"] > 0
    assert all(np.isfinite(value) for value in cell["parity"].values())
    assert cell["facts"]["built"]
    assert cell["facts"]["compared"] or cell["reason"].startswith("built, not run")


def test_a_published_artifact_has_the_outputs_of_torch(gru_repository: Path, checkpoints: Path) -> None:
    root = newest(gru_repository, f"{MODEL}_onnx")
    assert root
    source = Source(find_spec(MODEL), Checkpoint.load(checkpoints / MODEL))
    inputs = source.draw_inputs(np.random.default_rng(7), {"batch": 5, "time": 41})
    with open_runtime(root) as runtime:
        got, want = runtime.fresh(inputs), source.answer(inputs)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=1e-5)


def test_an_unchanged_artifact_is_reused_and_a_changed_one_is_not(run: Any, checkpoints: Path, tmp_path: Path) -> None:
    first = run("--target", "onnx", "--model", MODEL)[1][0]
    again = run("--target", "onnx", "--model", MODEL)[1][0]
    assert (first["status"], again["status"]) == ("ok", "reused")
    assert again["artifact"] == first["artifact"]
    forced = run("--target", "onnx", "--model", MODEL, "--force")[1][0]
    assert forced["status"] == "ok"
    assert forced["artifact"] != first["artifact"]
    Path(forced["artifact"], "model.onnx").write_bytes(b"damaged")
    assert run("--target", "onnx", "--model", MODEL)[1][0]["status"] == "ok"


def test_another_checkpoint_gives_another_key(
    checkpoints: Path, tmp_path: Path, run: Any, gru_repository: Path
) -> None:
    import torch

    shutil.copytree(gru_repository, tmp_path / "repository")
    spec = find_spec(MODEL)
    config = spec.preset("tiny")
    torch.manual_seed(1)
    sample_inputs = Checkpoint.load(checkpoints / MODEL).sample_inputs()
    other = tmp_path / "other"
    module = spec.interface.build(config)
    save_checkpoint(
        other / MODEL,
        spec,
        module,
        preset="tiny",
        config=config,
        training={},
        step=1,
        metrics={},
        sample_inputs=sample_inputs,
    )
    assert run("--target", "onnx", "--model", MODEL, source=other)[1][0]["status"] == "ok"


def change_one_weight(path: Path) -> None:
    model = onnx.load(path)
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = np.frombuffer(weight.raw_data, np.float32).copy()
    values[np.abs(values).argmax()] *= -2
    weight.raw_data = values.tobytes()
    onnx.save(model, path)


def put_a_nan(path: Path) -> None:
    model = onnx.load(path)
    bias = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 1 and tensor.data_type == 1)
    values = np.frombuffer(bias.raw_data, np.float32).copy()
    values[0] = np.nan
    bias.raw_data = values.tobytes()
    onnx.save(model, path)


def freeze_time(path: Path) -> None:
    model = onnx.load(path)
    frames = next(value for value in model.graph.input if value.name == "frames")
    dim = frames.type.tensor_type.shape.dim[1]
    dim.Clear()
    dim.dim_value = 30
    onnx.save(model, path)


@pytest.mark.parametrize("poison", [change_one_weight, put_a_nan, freeze_time])
def test_a_poisoned_artifact_is_not_published(
    poison: Callable[[Path], None], run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = onnx_target.TARGET.convert

    def poisoned(source: Source, precision: str, out: Path) -> Any:
        built = honest(source, precision, out)
        poison(out / "model.onnx")
        return built

    monkeypatch.setattr(onnx_target, "TARGET", replace(onnx_target.TARGET, convert=poisoned))
    status, (cell,) = run("--target", "onnx", "--model", MODEL)
    assert (status, cell["status"]) == (1, "failed")
    assert "\n" not in cell["reason"]
    assert published(tmp_path / "repository") == []


def test_one_failing_cell_does_not_stop_the_rest(run: Any, tmp_path: Path, checkpoints: Path) -> None:
    damaged = tmp_path / "checkpoints"
    shutil.copytree(checkpoints, damaged)
    weights = damaged / "policy_gru" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    status, cells = run(*("--target", "onnx", "--model", "policy_gru", "--model", "policy_lstm"), source=damaged)
    assert status == 1
    assert [cell["status"] for cell in cells] == ["failed", "ok"]
    assert "sha256" in cells[0]["reason"]


def test_a_dry_run_touches_nothing(run: Any, tmp_path: Path) -> None:
    status, cells = run("--target", "all", "--dry-run")
    assert status == 0
    assert {cell["status"] for cell in cells} == {"skipped"}
    assert all(cell["reason"] for cell in cells)
    assert not (tmp_path / "repository").exists()


def test_no_spec_repeats_the_reason_of_a_target(tmp_path: Path) -> None:
    vllm = plugins.load("export.targets", "vllm", "TARGET")
    for spec in all_specs().values():
        refused, own = vllm.refuse(spec), spec.export.skips.get("vllm")
        assert (refused is None) == (spec.export.language_model is not None)
        if refused:
            cell = Cell(spec=spec, target=vllm, precision=vllm.precisions[0])
            assert own != refused
            assert why_skipped(cell, tmp_path) == (own or refused)


def test_a_model_without_checkpoint_is_skipped_with_the_command_that_makes_one(run: Any, tmp_path: Path) -> None:
    status, (cell,) = run("--target", "onnx", MODEL, source=tmp_path)
    assert (status, cell["status"]) == (1, "skipped"), "a named model was not exported"
    assert f"python -m training.run {MODEL}" in cell["reason"]
    for everything in ([], ["all"]):
        status, cells = run(*everything, "--target", "onnx", source=tmp_path)
        assert (status, {cell["status"] for cell in cells}) == (0, {"skipped"})


def test_a_named_model_that_no_requested_target_takes_is_not_exported(run: Any) -> None:
    status, (cell,) = run(MODEL, "--target", "vllm")
    assert (status, cell["status"], cell["reason"]) == (1, "skipped", "not a decoder language model")
    status, cells = run(MODEL, "--target", "vllm,onnx")
    assert (status, [cell["status"] for cell in cells]) == (0, ["skipped", "ok"])
    assert run(MODEL, "--target", "vllm,onnx", "--dry-run", "--force")[0] == 0


def test_models_are_positional_and_lists_take_commas_repetition_and_any_case(run: Any) -> None:
    def cells(*arguments: str) -> list[tuple[str, str, str]]:
        status, found = run(*arguments, "--dry-run")
        assert status == 0
        return [(cell["model"], cell["target"], cell["precision"]) for cell in found]

    expected = [
        (model, target, precision)
        for model in ("policy_gru", "policy_lstm")
        for target in ("onnx", "torch")
        for precision in ("fp32", "fp16")
    ]
    assert cells("policy_gru", "policy_lstm", "--target", "onnx,torch", "--precision", "fp32,fp16") == expected
    assert cells("Policy_GRU,policy_lstm", "--target", "ONNX", "--target", "torch", "--precision", "FP32",
                 "--precision", "fp16") == expected  # fmt: skip
    assert cells("--model", "policy_gru", "--model", "policy_lstm", "--target", "onnx,torch,onnx", "--precision",
                 "fp32,fp16") == expected  # fmt: skip


def test_the_table_is_followed_by_three_commands(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = tmp_path / "repository"
    places = ["--checkpoints", str(checkpoints), "--repository", str(repository)]
    assert export_all.main([MODEL, "--target", "onnx", *places]) == 0
    *_, following, predict, bench, serve = capsys.readouterr().out.splitlines()
    assert following == "next:"
    assert predict.startswith(f"  python -m runtimes.predict {MODEL} --target onnx --precision fp32")
    assert bench == f"  python -m runtimes.bench {MODEL} --repository {repository}"
    assert serve == f"  python -m runtimes.serve --repository {repository}"
    token = program.set("slipway export")
    try:
        assert export_all.main([MODEL, "--target", "onnx", *places]) == 0
    finally:
        program.reset(token)
    assert f"\n  slipway bench {MODEL}" in capsys.readouterr().out
    assert export_all.main([MODEL, "--target", "vllm", *places]) == 1
    assert "next:" not in capsys.readouterr().out


def test_a_checkpoint_of_another_model_fails_its_cell(run: Any, tmp_path: Path, checkpoints: Path) -> None:
    shutil.copytree(checkpoints / "policy_lstm", tmp_path / "checkpoints" / MODEL)
    status, (cell,) = run("--target", "onnx", "--model", MODEL, source=tmp_path / "checkpoints")
    assert (status, cell["status"]) == (1, "failed")
    assert "policy_lstm" in cell["reason"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--target", "onx"], "expected a known target, found 'onx'; did you mean 'onnx'?"),
        (
            ["policy_gruu", "--target", "onnx"],
            "expected a known model, found 'policy_gruu'; did you mean 'policy_gru'?",
        ),
        (["--target", "onnx", "--model", "nonsense"], "expected a known model, found 'nonsense'; list them"),
        (["--target", "onnx", "--precision", "fp31"], "expected a known precision, found 'fp31'; did you mean 'fp32'?"),
        (["--target", "onnx", "--jobs", "0"], "--jobs: expected 1 or more, found 0"),
        ([], "--target"),
    ],
)
def test_an_unknown_name_is_refused_in_one_line_with_the_nearest_known_one(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export_all.main(arguments) == 2
    printed = capsys.readouterr()
    assert named in printed.err
    assert printed.out == ""


def test_a_full_disk_leaves_the_repository_as_it_was(
    run: Any, tmp_path: Path, gru_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(gru_repository, repository)
    before = contents(repository)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_target, "TARGET", replace(onnx_target.TARGET, convert=full))
    status, (cell,) = run("--target", "onnx", "--model", MODEL, "--force")
    assert (status, cell["status"]) == (1, "failed")
    assert "No space left" in cell["reason"]
    assert contents(repository) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_manifest_of_a_checkpoint_lists_its_files(checkpoints: Path) -> None:
    data = json.loads((checkpoints / MODEL / MANIFEST).read_text())
    assert data["model"] == MODEL
    assert set(data["files"]) == {"weights.safetensors", "sample_inputs.safetensors"}


@pytest.fixture(scope="session")
def source(checkpoints: Path) -> Source:
    return Source(find_spec("policy_attention"), Checkpoint.load(checkpoints / "policy_attention"))


class Echo:
    """A candidate that answers as the original, but for what a test changes."""

    def __init__(self, source: Source, change: Callable[[dict[str, np.ndarray]], None]) -> None:
        self.source, self.change, self.signature = source, change, source.signature

    def fresh(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        answer = {name: array.copy() for name, array in self.source.answer(inputs).items()}
        self.change(answer)
        return answer


def halves(answer: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    yield from ((name, array) for name, array in answer.items() if array.dtype.kind == "f")


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        (lambda answer: answer["main_x"].fill(np.nan), "difference_main_x"),
        (lambda answer: answer["c_y"].__setitem__((0, 0, 0), np.nan), "difference_c_y"),
        (lambda answer: answer["buttons"].__iadd__(1e-3), "difference_buttons"),
        (lambda answer: answer["seen_out"].__iadd__(1), "difference_seen_out"),
    ],
)
def test_a_wrong_output_fails_its_own_check(source: Source, change: Any, failing: str) -> None:
    inputs = source.draw_inputs(np.random.default_rng(0), {"batch": 2, "time": 5})
    got = Echo(source, change).fresh(inputs)
    checks = parity.compare(source, got, source.answer(inputs), source.spec.parity.tolerance["fp32"])
    assert not checks[failing].passed
    with pytest.raises(ParityError, match=failing):
        parity.require_passed(checks)
    passed = [name for name, check in checks.items() if name.startswith("difference") and check.passed]
    assert len(passed) == len([name for name in checks if name.startswith("difference")]) - 1


def test_a_flipped_decision_is_noticed_even_within_the_tolerance_of_numbers(source: Source) -> None:
    inputs = source.draw_inputs(np.random.default_rng(0), {"batch": 8, "time": 30})
    want = source.answer(inputs)
    got = {**want, "main_x": want["main_x"][..., ::-1]}
    checks = source.spec.parity.agreement(got, want, source.spec.parity.tolerance["fp32"])
    assert not checks["same_main_x"].passed
    assert not checks["clear_main_x"].passed
    assert checks["same_main_y"].passed
    assert checks["clear_main_y"].passed


def test_every_dynamic_axis_is_checked_at_its_bounds(source: Source) -> None:
    checked = list(parity.sizes_to_check(source.signature))
    for axis in source.signature.axes:
        assert {axis.min, axis.opt, axis.max} <= {sizes[axis.name] for sizes in checked}


def test_a_rollout_notices_a_state_that_is_not_reset(checkpoints: Path, gru_repository: Path) -> None:
    source = Source(find_spec(MODEL), Checkpoint.load(checkpoints / MODEL))
    root = newest(gru_repository, f"{MODEL}_onnx")
    assert root
    with open_runtime(root) as runtime:
        got, want = parity.rollout(runtime, source, np.random.default_rng(0))
        np.testing.assert_allclose(got["main_x"], want["main_x"], atol=1e-5)
        stream_class = type(runtime.stream(1))
        forgetful = pytest.MonkeyPatch()
        forgetful.setattr(stream_class, "reset", lambda self, rows: None)
        got, want = parity.rollout(runtime, source, np.random.default_rng(0))
        forgetful.undo()
    assert np.abs(got["main_x"] - want["main_x"]).max() > 1e-4


def test_the_cells_of_one_model_share_one_original(checkpoints: Path) -> None:
    sources = LastSource()

    def source_of(model: str, samples: int = 8) -> Source:
        return sources.of(find_spec(model), Checkpoint.load(checkpoints / model), CalibrationTexts(samples=samples))

    first = source_of("policy_gru")
    assert source_of("policy_gru") is first
    other = source_of("policy_lstm")
    assert other.spec.name == "policy_lstm"
    assert source_of("policy_gru") is not first, "one original is held at a time"
    assert source_of("policy_gru", samples=9).texts.samples == 9


def test_an_artifact_names_its_checkpoint_and_libraries(gru_repository: Path, checkpoints: Path) -> None:
    root = newest(gru_repository, f"{MODEL}_onnx")
    assert root
    artifact = Artifact.load(root)
    assert artifact.checkpoint == Checkpoint.load(checkpoints / MODEL).digest
    assert artifact.built_with["opset"] == "20"
    assert {"torch", "onnx", "onnxruntime"} <= set(artifact.built_with)
    assert artifact.verified

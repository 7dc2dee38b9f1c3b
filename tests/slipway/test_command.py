"""The slipway command: a table of subcommands, light help, the exit statuses and texts of the modules behind it."""

import importlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import slipway
from runtimes import predict
from slipway.command import GROUPS, MODULES, help_text, main

ROOT = Path(__file__).parents[2]
HEAVY = ("numpy", "torch", "transformers", "onnxruntime", "onnx", "safetensors", "tqdm", "training", "export")
SUBCOMMANDS = {
    *("export", "train", "evaluate", "precompute", "sweep", "predict", "generate", "bench", "serve", "compare"),
    *("report", "advise", "matrix", "verify", "search", "web", "soak", "list"),
}
WITHOUT_TORCH = (
    "import sys; sys.modules['torch'] = None; from slipway.command import main; sys.exit(main(sys.argv[1:]))"
)


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=ROOT)


def test_the_subcommands_are_those_of_the_design() -> None:
    assert set(MODULES) == SUBCOMMANDS


@pytest.mark.parametrize("module", sorted(MODULES.values()))
def test_every_subcommand_has_a_main(module: str) -> None:
    assert callable(importlib.import_module(module).main)


def test_the_help_lists_every_subcommand_with_its_purpose(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == main(["-h"]) == main(["help"]) == 0
    text = capsys.readouterr().out
    for group, own in GROUPS.items():
        assert f"\n{group}:\n" in text
        for name, (_, summary) in own.items():
            assert re.search(rf"^  {name} +{re.escape(summary)}$", text, re.MULTILINE)


def test_no_subcommand_prints_the_help_on_stderr_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr() == ("", help_text() + "\n")


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"slipway {slipway.__version__}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+", slipway.__version__)


@pytest.mark.parametrize(("name", "nearest"), [("exprot", "export"), ("benchmark", "bench"), ("Train", "train")])
def test_an_unknown_subcommand_gets_the_nearest_one(
    name: str, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"error: expected a known command, found '{name}'; did you mean '{nearest}'? list them: slipway --help\n"
    )


def test_help_shows_examples_of_the_subcommand_and_python_m_shows_the_module(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["predict", "--help"])
    assert "  slipway predict policy_gru --example > request.json" in capsys.readouterr().out
    predict.main(["--help"])
    assert "  python -m runtimes.predict policy_gru --example" in capsys.readouterr().out


def test_a_subcommand_is_the_module_with_its_output_and_status(
    gru_repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["policy_gru", "--repository", str(gru_repository), "--example"]
    assert main(["predict", *arguments]) == predict.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed[: len(printed) // 2] == printed[len(printed) // 2 :]
    assert main(["predict", "policy_gru", "--repository", "/nothing"]) == 2


def test_help_imports_nothing_heavy() -> None:
    code = f"import sys; from slipway.command import main; main(['--help']); print({HEAVY} & sys.modules.keys())"
    code = code.replace(str(HEAVY), f"set({HEAVY})")
    assert run("-c", code).stdout.splitlines()[-1] == "set()"
    assert run("-c", f"import slipway, sys; print(set({HEAVY}) & sys.modules.keys())").stdout == "set()\n"


@pytest.mark.slow
def test_help_takes_less_than_0_3_seconds() -> None:
    def seconds() -> float:
        started = time.perf_counter()
        assert run("-m", "slipway", "--help").returncode == 0
        return time.perf_counter() - started

    assert min(seconds() for _ in range(5)) < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODULES))
def test_the_help_of_every_subcommand_needs_no_torch(name: str) -> None:
    ran = run("-c", WITHOUT_TORCH, name, "--help")
    assert ran.returncode == 0, ran.stderr[-500:]
    assert ran.stdout.startswith(f"usage: slipway {name} ")
    assert f"\n  slipway {name} " in ran.stdout or f"\n  slipway {name}\n" in ran.stdout
    wrong = run("-c", WITHOUT_TORCH, name, "--no-such-option")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("error: ")
    assert wrong.stderr.count("\n") == 1


@pytest.mark.slow
def test_training_without_torch_is_one_line_with_the_extra() -> None:
    ran = run("-c", WITHOUT_TORCH, "train", "policy_gru", "--out", "/tmp/nothing")
    assert ran.returncode == 2
    assert re.fullmatch(r"error: expected package 'torch', found none .*'\.\[train\]'\n", ran.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("command", [["-m", "export.all"], ["-m", "slipway", "export"]], ids=["module", "slipway"])
def test_export_without_torch_is_one_line_with_the_extras(
    command: list[str], checkpoints: Path, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('planted', name='torch')")
    places = ["--checkpoints", str(checkpoints), "--repository", str(tmp_path / "repository")]
    ran = subprocess.run(
        [sys.executable, *command, "policy_gru", "--target", "onnx", *places],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    assert (ran.returncode, "Traceback" in ran.stderr) == (2, False), ran.stderr[-500:]
    assert re.fullmatch(r"error: expected package 'torch', found none .*'\.\[export,train\]'\n", ran.stderr)


def test_a_part_of_slipway_that_is_not_installed_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "export"]:
        monkeypatch.delitem(sys.modules, name)

    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name="export")

    monkeypatch.setattr("slipway.command.importlib.import_module", absent)
    assert main(["verify"]) == 2
    assert capsys.readouterr().err.startswith("error: expected package 'export' for slipway verify, found none")


def test_no_file_tells_to_install_a_package_of_others() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], capture_output=True, check=False, cwd=ROOT)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    wrong = re.compile(rb"pip install [^\n]*\bslipway(\[|['\"\s`]|$)", re.MULTILINE)
    assert wrong.search(b"pip install 'slip" + b"way[onnx]'")
    assert wrong.search(b"pip install slip" + b"way\n")
    found = [
        name
        for name in tracked.stdout.decode().split("\0")
        if name and (ROOT / name).is_file() and wrong.search((ROOT / name).read_bytes())
    ]
    assert found == []

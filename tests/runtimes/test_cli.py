"""A command line ends in an exit status and with an error of one line, never in a traceback."""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtimes import predict
from runtimes.errors import (
    ArtifactError,
    EngineError,
    InputError,
    MissingPackage,
    ParityError,
    SlipwayError,
    one_line,
    require,
)
from runtimes.host.cli import (
    EXTRAS,
    command,
    existing_folder,
    flags,
    parser,
    settings,
    table,
)
from runtimes.host.output_capture import bars_on_a_terminal_only
from runtimes.host.progress import Progress, progress

ROOT = Path(__file__).parents[2]
COMMANDS = [
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__main__")
    for package in ("runtimes", "training", "export")
    for path in sorted((ROOT / package).rglob("*.py"))
    if "\n@command" in path.read_text()
]


@pytest.mark.parametrize("status", [0, 1, 2])
def test_the_status_is_what_main_returns(status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(lambda argv: status)([]) == status
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (SlipwayError, 1),
        (ArtifactError, 1),
        (EngineError, 1),
        (ParityError, 1),
        (InputError, 2),
        (MissingPackage, 2),
        (PermissionError, 1),
        (OSError, 1),
    ],
)
def test_an_error_is_one_line_and_a_status(
    error: type[Exception], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    @command
    def main(argv: list[str] | None = None) -> int:
        raise error("expected this,\n   found that")

    assert main([]) == status
    assert capsys.readouterr() == ("", "error: expected this, found that\n")


def test_an_error_of_another_kind_is_raised() -> None:
    @command
    def main(argv: list[str] | None = None) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main([])


def test_an_interruption_is_130_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def main(argv: list[str] | None = None) -> int:
        raise KeyboardInterrupt

    assert main([]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["--nothing"], 2), ([], 2), (["a", "b"], 2)])
def test_an_exit_of_argparse_is_a_status(arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def main(argv: list[str] | None = None) -> int:
        made = parser("toy", "Does nothing.", "first --x 1", "second")
        made.add_argument("name")
        made.parse_args(argv)
        return 0

    assert main(arguments) == status
    capsys.readouterr()


def test_help_opens_with_commands_to_paste() -> None:
    text = parser("runtimes.toy", "Does nothing.", "first --x 1", "").format_help()
    assert "  python -m runtimes.toy first --x 1\n  python -m runtimes.toy\n\nDoes nothing." in text


def test_an_abbreviated_option_is_not_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    made = parser("toy", "Does nothing.")
    made.add_argument("--checkpoint")
    with pytest.raises(SystemExit):
        made.parse_args(["--check", "x"])
    assert "unrecognized arguments: --check" in capsys.readouterr().err


def test_there_are_commands() -> None:
    assert {"training.run", "training.evaluate", "export.all", "runtimes.predict", "runtimes.bench"} <= set(COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_has_help_with_two_commands_to_paste(module: str) -> None:
    ran = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0
    assert ran.stdout.count(f"  python -m {module}") >= 2
    wrong = subprocess.run([sys.executable, "-m", module, "--nothing"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr


def test_settings_are_pairs_and_the_last_one_counts() -> None:
    assert settings(["a=1", "b=x=y", "c=", "a=2"]) == {"a": "2", "b": "x=y", "c": ""}
    assert settings([]) == {}


@pytest.mark.parametrize("pair", ["a", "", "=1", "="])
def test_a_setting_without_name_or_value_is_refused(pair: str) -> None:
    with pytest.raises(InputError, match=f"--set: expected NAME=VALUE, found '{pair}'"):
        settings([pair])


def test_flags_are_settings_with_dashes() -> None:
    assert flags(["--a-b", "1", "--c", "-2"]) == {"a_b": "1", "c": "-2"}
    assert flags([]) == {}


@pytest.mark.parametrize(
    ("arguments", "found"),
    [(["--a"], "'--a'"), (["a", "1"], "'a' 1"), (["--a", "1", "--b"], "'--b'"), (["-a", "1"], "'-a' 1")],
)
def test_a_flag_without_a_value_and_a_value_without_a_flag_are_refused(arguments: list[str], found: str) -> None:
    with pytest.raises(InputError, match=f"expected --NAME VALUE, found {found}"):
        flags(arguments)


def test_an_existing_folder_is_a_folder(tmp_path: Path) -> None:
    assert existing_folder(tmp_path, "replays") == tmp_path
    assert existing_folder(str(tmp_path), "replays") == tmp_path
    with pytest.raises(InputError, match=r"expected a folder with replays at .*/nothing, found nothing"):
        existing_folder(tmp_path / "nothing", "replays")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="found a file"):
        existing_folder(tmp_path / "file", "replays")


def test_a_table_aligns_words_left_and_numbers_right() -> None:
    assert table(["name", "ms"], [("a", 1.5), ("longer", "10.25"), ("b", "-")]).splitlines() == [
        "name    ms",
        "------  -----",
        "a         1.5",
        "longer  10.25",
        "b       -",
    ]


def test_a_negative_number_is_aligned_as_a_number_and_a_sentence_that_begins_with_one_is_not() -> None:
    assert table(["change"], [("-1.5",), ("10.25",)]).splitlines()[2:] == ["  -1.5", " 10.25"]
    assert table(["reason"], [("3 failed",), ("all of them failed",)]).splitlines()[2:] == [
        "3 failed",
        "all of them failed",
    ]


def test_a_table_without_rows_is_its_header() -> None:
    assert table(["a", "bc"], []).splitlines() == ["a  bc", "-  --"]


def test_one_line_is_one_line_of_at_most_so_many_characters() -> None:
    assert one_line(ValueError("a\n  b\tc")) == "a b c"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line(ValueError("x" * 1000))) == 300
    assert one_line(ValueError("x" * 1000)).endswith("…")


def test_a_missing_package_names_the_extra_that_brings_it() -> None:
    assert require("json", extra="none") is json
    with pytest.raises(MissingPackage, match=r"expected package 'no_such'.*: pip install '\.\[tensorrt\]'"):
        require("no_such.part", extra="tensorrt")


def test_no_published_artifact_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict.main(["policy_gru", "--repository", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"expected an artifact 'policy_gru_onnx' in {tmp_path}, found none; publish it: " in error
    assert error.endswith("python -m export.all policy_gru --target onnx\n")


@pytest.mark.parametrize("module", ["export.all", "training.run"])
def test_a_package_that_is_not_installed_is_one_line_with_its_extra(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)

    def main(argv: list[str] | None = None) -> int:
        import torch

        return torch.initial_seed()

    main.__module__ = module
    assert command(main)([]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: expected package 'torch', found none")
    assert ("[export,train]'" if module == "export.all" else "[train]'") in error
    assert error.count("\n") == 1


def test_a_missing_module_of_this_project_is_raised() -> None:
    @command
    def main(argv: list[str] | None = None) -> int:
        import runtimes.no_such_module

        return runtimes.no_such_module.status

    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        main([])


def test_every_extra_of_a_package_brings_it() -> None:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    distribution = {"onnx_ir": "onnxscript", "sklearn": "scikit-learn", "torch_geometric": "torch-geometric"}
    for package, extra in EXTRAS.items():
        name = distribution.get(package, package)
        assert any(re.split(r"[^\w-]", each)[0] == name for each in declared[extra]), f"{package}: {extra}"


def test_output_into_a_closed_pipe_is_no_traceback() -> None:
    code = """
import sys
from runtimes.host.cli import command

@command
def main(argv=None):
    print("x\\n" * 100_000)
    return 0

sys.exit(main([]))
"""
    script = f'"{sys.executable}" -c "$0" | head -n 1'
    ran = subprocess.run(["bash", "-c", script, code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (ran.stdout, ran.stderr) == ("x\n", "")


def test_an_error_of_the_command_line_is_one_line_with_the_nearest_option(capsys: pytest.CaptureFixture[str]) -> None:
    made = parser("toy", "Does nothing.")
    made.add_argument("--concurrency", type=int)
    hidden = made.add_argument("--concurrent", help=argparse.SUPPRESS)
    assert hidden.dest == "concurrent"
    with pytest.raises(SystemExit, match="2"):
        made.parse_args(["--concurency", "1"])
    found = capsys.readouterr().err
    assert found == (
        "error: unrecognized arguments: --concurency 1; did you mean --concurrency; see python -m toy --help\n"
    )


@pytest.mark.parametrize("package", ["runtimes", "training", "export"])
def test_a_package_lists_its_commands(package: str) -> None:
    ran = subprocess.run([sys.executable, "-m", package], capture_output=True, text=True, check=True, cwd=ROOT)
    own = [name for name in COMMANDS if name.startswith(f"{package}.")]
    listed = [line.split()[2] for line in ran.stdout.splitlines()[2:]]
    assert listed == [name for name in own if "previous_names" not in name]
    assert all(len(line.split()) > 4 for line in ran.stdout.splitlines()[2:])  # each with its purpose


def test_progress_without_a_terminal_is_lines_also_while_a_step_computes(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("export", 2, every_s=0.05) as bar:
        bar.advance()
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 3
    assert lines[0].startswith("export: 1 of 2, ")
    assert [line.endswith(", ended") for line in lines] == [*[False] * (len(lines) - 1), True]


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("export", 2, every_s=0.01) as bar:
        bar.advance()
        bar.describe("verify")
        time.sleep(0.05)
    text = capsys.readouterr().err
    assert "verify:  50%" in text
    assert "1 of 2" not in text


def test_progress_goes_on_where_the_bars_of_a_library_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("export", every_s=0.05), bars_on_a_terminal_only():
        print("a bar", file=sys.stderr)
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert all(line.startswith("export: ") for line in lines)


def test_short_work_prints_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress([1, 2], "short")) == [1, 2]
    assert capsys.readouterr().err == ""

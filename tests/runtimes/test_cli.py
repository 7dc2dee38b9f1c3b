"""A command line ends in an exit status and says what is wrong in one line, never in a traceback."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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
    command,
    existing_folder,
    flags,
    hidden_alias,
    models_argument,
    parser,
    settings,
    table,
    target_argument,
    unknown_name,
)
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


def test_a_fault_of_ours_is_not_hidden() -> None:
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
def test_what_argparse_ends_is_a_status_too(
    arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
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
def test_what_is_no_flag_with_its_value_is_refused(arguments: list[str], found: str) -> None:
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


def test_a_negative_number_is_a_number_and_a_sentence_that_begins_with_one_is_not() -> None:
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
    assert "found no 'policy_gru_onnx'; published: none" in capsys.readouterr().err


def named(most: int | None = None, least: int = 0) -> Any:
    made = parser("toy", "Does nothing.")
    models_argument(made, "models", least=least, most=most)
    target_argument(made, "targets")
    made.add_argument("--concurrency", type=int, action="append", default=[])
    hidden_alias(made, "--lanes", "--concurrency")
    return made


@pytest.mark.parametrize(
    "arguments",
    [["a", "b"], ["--model", "a", "--model", "b"], ["--model", "A,b"], ["a", "--model", "b"], ["A,B"]],
)
def test_models_are_positional_or_an_option_and_case_does_not_matter(arguments: list[str]) -> None:
    assert named().parse_args(arguments).models == ["a", "b"]


@pytest.mark.parametrize("arguments", [["gru"], ["--model", "gru"]])
def test_a_command_for_one_model_has_its_name(arguments: list[str]) -> None:
    assert named(most=1, least=1).parse_args(arguments).model == "gru"


@pytest.mark.parametrize(("arguments", "error"), [([], "required: MODEL"), (["a", "b"], "expected one MODEL")])
def test_too_few_and_too_many_models_are_refused(
    arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        named(most=1, least=1).parse_args(arguments)
    assert error in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--target", "onnx,torch"], ["--target", "ONNX", "--target", "torch"]])
def test_targets_are_separated_by_commas_or_repeated(arguments: list[str]) -> None:
    assert named().parse_args(arguments).target == ["onnx", "torch"]
    assert named().parse_args([]).target == []  # the default is not shared with an earlier call


def test_an_older_name_of_an_option_works_and_is_not_in_the_help() -> None:
    assert named().parse_args(["--lanes", "1", "--concurrency", "2"]).concurrency == [1, 2]
    assert "--lanes" not in named().format_help()


def test_an_unknown_name_gets_the_nearest_one_and_the_remedy() -> None:
    known = [f"model_{i}" for i in range(20)] + ["policy_gru"]
    text = str(unknown_name("model", "policy_gur", known, "list them: slipway list"))
    assert text == "expected a known model, found 'policy_gur'; did you mean 'policy_gru'? list them: slipway list"
    assert "model_3" not in str(unknown_name("model", "zebra", known, "list them: slipway list"))


def test_progress_without_a_terminal_is_lines_also_while_a_step_computes(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("export", 2, every_s=0.05) as bar:
        bar.advance()
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert lines[0].startswith("export: 1 of 2, ")


def test_short_work_prints_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress([1, 2], "short")) == [1, 2]
    assert capsys.readouterr().err == ""

"""Shared arguments: models, names, settings, artifact, engine; any order, any case, old names."""

from typing import Any

import pytest

from runtimes.errors import InputError
from runtimes.host.cli import (
    artifact_arguments,
    device_arguments,
    flags,
    hidden_alias,
    models_argument,
    names_argument,
    parser,
    settings,
    settings_argument,
    target_argument,
    unknown_name,
)


def named(most: int | None = None, least: int = 0) -> Any:
    made = parser("toy", "Does nothing.")
    models_argument(made, "models", least=least, most=most)
    target_argument(made, "targets")
    made.add_argument("--concurrency", type=int, action="append", default=[])
    hidden_alias(made, "--lanes", "--concurrency")
    return made


@pytest.mark.parametrize(
    "arguments",
    [
        ["a", "b"],
        ["--model", "a", "--model", "b"],
        ["--model", "A,b"],
        ["a", "--model", "b"],
        ["A,B"],
        ["a", "--concurrency", "1", "b"],
        ["--target", "onnx", "a", "--concurrency", "1", "b"],
    ],
)
def test_models_are_positional_or_an_option_and_case_does_not_matter(arguments: list[str]) -> None:
    assert named().parse_args(arguments).models == ["a", "b"]


@pytest.mark.parametrize("arguments", [["gru"], ["--model", "gru"]])
def test_a_command_for_one_model_has_its_name(arguments: list[str]) -> None:
    assert named(most=1, least=1).parse_args(arguments).model == "gru"


@pytest.mark.parametrize(
    ("least", "most", "shown"),
    [(0, None, "[MODEL ...]"), (1, None, "MODEL [MODEL ...]"), (0, 1, "[MODEL]"), (1, 1, "MODEL")],
)
def test_the_usage_shows_how_many_models_a_command_takes(least: int, most: int | None, shown: str) -> None:
    made = parser("toy", "Does nothing.")
    models_argument(made, "models", least=least, most=most)
    assert made.format_usage() == f"usage: python -m toy [-h] {shown}\n"
    assert "\n  MODEL       models\n" in made.format_help()


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


def test_a_path_keeps_its_case_and_its_commas() -> None:
    assert named().parse_args(["./My,Model", "GRU"]).models == ["./My,Model", "gru"]


def test_a_list_of_known_names_refuses_others_with_the_nearest_one() -> None:
    made = parser("toy", "Does nothing.")
    names_argument(made, "--scenario", "load", known=("single-stream", "server"))
    assert made.parse_args(["--scenario", "Server,single-stream"]).scenario == ["server", "single-stream"]
    assert "load; of single-stream, server" in " ".join(made.format_help().split())
    with pytest.raises(
        InputError, match="expected a known scenario, found 'servre'; did you mean 'server'\\? see --help"
    ):
        made.parse_args(["--scenario", "servre"])


def trained() -> Any:
    made = parser("toy", "Does nothing.")
    models_argument(made, "models", least=1)
    settings_argument(made)
    made.add_argument("--json", action="store_true")
    return made


@pytest.mark.parametrize(
    "arguments",
    [
        ["gru", "lstm", "--set", "a=1", "--lr", "3e-4", "--json"],
        ["--set", "a=1", "gru", "--json", "lstm", "--lr", "3e-4"],
        ["--lr", "3e-4", "gru", "--set", "a=1", "lstm", "--json"],
        ["--lr=3e-4", "--json", "gru", "lstm", "--set", "a=1"],
    ],
)
def test_models_and_settings_stand_in_any_order(arguments: list[str]) -> None:
    found, more = trained().parse_known_args(arguments)
    assert (found.models, found.json) == (["gru", "lstm"], True)
    assert {**settings(found.set), **flags(more)} == {"a": "1", "lr": "3e-4"}


def test_a_setting_whose_value_is_missing_does_not_take_the_next_option() -> None:
    found, more = trained().parse_known_args(["gru", "--lr", "--json"])
    assert found.json
    with pytest.raises(InputError, match="expected --NAME VALUE, found '--lr'"):
        flags(more)


@pytest.mark.parametrize("count", ["0", "-1", "two", "1.5"])
def test_threads_are_a_positive_number(count: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = parser("toy", "Does nothing.")
    device_arguments(made)
    with pytest.raises(SystemExit):
        made.parse_args([f"--threads={count}"])
    assert f"--threads: expected an integer of 1 or more, found '{count}'" in capsys.readouterr().err


def test_shared_arguments_are_in_groups_and_show_their_defaults() -> None:
    made = parser("toy", "Does nothing.")
    artifact_arguments(made)
    device_arguments(made)
    text = made.format_help()
    assert "\nartifact:\n" in text
    assert "\nengine:\n" in text
    assert " ".join(text.split()).count("(default: ") == 5
    assert made.parse_args(["--target", "ONNX", "--device", "CPU"]).device == "cpu"


def test_an_older_name_of_an_option_works_and_is_not_in_the_help() -> None:
    assert named().parse_args(["--lanes", "1", "--concurrency", "2"]).concurrency == [1, 2]
    assert "--lanes" not in named().format_help()


def test_an_unknown_name_gets_the_nearest_one_and_the_remedy() -> None:
    known = [f"model_{i}" for i in range(20)] + ["policy_gru"]
    text = str(unknown_name("model", "policy_gur", known, "list them: slipway list"))
    assert text == "expected a known model, found 'policy_gur'; did you mean 'policy_gru'? list them: slipway list"
    assert "model_3" not in str(unknown_name("model", "zebra", known, "list them: slipway list"))

"""The commands of the documentation: each is taken by the real parser; those that can run here run as printed."""

import argparse
import importlib
import inspect
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest

from runtimes.host import cli
from runtimes.host.cli import flags, settings
from tests.docs.blocks import ROOT, Block, blocks_of, commands, markdown_pages
from tests.toys import no_server
from training.settings import defaults, override
from training.spec import all_specs, find_spec

PACKAGES = ("slipway", "runtimes", "training", "export", "benchmarks")
SHELL = [block for page in markdown_pages() for block in blocks_of(page) if block.language == "bash"]
# Dated measurements: their commands are taken by the parsers, but take hours.
MEASUREMENTS = ROOT / "benchmarks"
RUN_LIMIT_S = 600


class Parsed(Exception):
    """The command line was accepted; `extras` are settings of models."""

    def __init__(self, arguments: argparse.Namespace, extras: list[str]) -> None:
        super().__init__("parsed")
        self.arguments, self.extras = arguments, extras


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands end when their command line is parsed: with `Parsed`, or as they do for a wrong one."""
    inner, outer = argparse.ArgumentParser.parse_known_args, cli.Parser.parse_known_args

    def plain(self: Any, args: Any = None, namespace: Any = None) -> Any:
        found, extras = inner(self, args, namespace)
        if isinstance(self, cli.Parser):
            return found, extras
        raise Parsed(found, extras)

    def with_aliases(self: Any, args: Any = None, namespace: Any = None) -> Any:
        raise Parsed(*outer(self, args, namespace))

    def complete(self: Any, args: Any = None, namespace: Any = None) -> Any:
        try:
            self.parse_known_args(args, namespace)
        except Parsed as parsed:
            if parsed.extras:
                self.error(f"unrecognized arguments: {' '.join(parsed.extras)}")
            raise

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", plain)
    for parser in (argparse.ArgumentParser, cli.Parser):
        monkeypatch.setattr(parser, "parse_args", complete)
    monkeypatch.setattr(cli.Parser, "parse_known_args", with_aliases)


def module_and_arguments(words: list[str]) -> tuple[str, list[str]] | None:
    """The module that a command runs, with its arguments; None for a command that is not this project's."""
    if words[0] == "slipway":
        return "slipway", words[1:]
    if words[0].rpartition("/")[2] in ("python", "torchrun") and "-m" in words:
        place = words.index("-m") + 1
        return (words[place], words[place + 1 :]) if words[place].partition(".")[0] in PACKAGES else None
    if words[0] == "python" and words[1].startswith("benchmarks/"):
        return words[1].removesuffix(".py").replace("/", "."), words[2:]
    return None


def check(module: str, arguments: list[str]) -> None:
    """An assertion fails unless the module's parser takes the arguments, and the named models the settings."""
    if arguments in (["--help"], ["--version"]):
        return
    with pytest.raises(Parsed) as caught:
        refuse_to_end(module, arguments)
    found, extras = caught.value.arguments, caught.value.extras
    if extras:
        check_settings(found, {**settings(getattr(found, "set", None) or []), **flags(extras)})


def refuse_to_end(module: str, arguments: list[str]) -> NoReturn:
    """Calls the module's `main`; an assertion fails if it returns, as it does for a wrong command line."""
    main = main_of("slipway.command" if module == "slipway" else module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *arguments])
        status = main(arguments) if inspect.signature(main).parameters else main()
    pytest.fail(f"{module} {' '.join(arguments)} ended with status {status}")


def main_of(module: str) -> Callable[..., Any]:
    """The `main` of a module or of a package's `__main__`; scripts find the files beside them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str((ROOT / module.replace(".", "/")).parent))
        found = importlib.import_module(module)
        if not hasattr(found, "main"):
            found = importlib.import_module(f"{module}.__main__")
        main: Callable[..., Any] = found.main
        return main


def check_settings(found: argparse.Namespace, changes: dict[str, str]) -> None:
    """An assertion fails unless every named model has these settings, and takes their values."""
    names = getattr(found, "models", None) or [found.model]
    names = [spec.name for spec in all_specs().values() if spec.trained] if names == ["all"] else names
    for name in names:
        spec = find_spec(name)
        config, training = defaults(spec, getattr(found, "preset", "tiny"))
        known, previous = {**config, **training}, getattr(spec.training, "renamed", {})
        given = {previous.get(setting, setting): value for setting, value in changes.items()}
        assert set(given) <= set(known), f"{name} has no setting {', '.join(set(given) - set(known))}"
        override(known, {setting: value for setting, value in given.items() if not value.startswith("$")})


def check_make(words: list[str]) -> None:
    """An assertion fails unless the Makefile has every named target."""
    targets = re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for word in words[1:]:
        assert "=" in word or word in targets, f"the Makefile has no target {word}"


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.place)
def test_every_command_is_taken_by_its_parser(block: Block, parse_only: None) -> None:
    for words in commands(block.text):
        if words[0] == "make":
            check_make(words)
        elif found := module_and_arguments(words):
            check(*found)


@pytest.mark.parametrize(
    "line",
    ["slipway predict policy_gru --no-such-flag", "slipway train policy_gru --no-such-setting 1", "make nothing"],
)
def test_a_wrong_command_is_noticed(line: str, parse_only: None) -> None:
    (words,) = commands(line)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_make(words) if words[0] == "make" else check(*module_and_arguments(words) or ("", []))


def test_comments_redirections_and_joined_lines_are_no_arguments() -> None:
    text = "A=1 python -m x --a \\\n  b > f  # note\nuntil c; do sleep 1; done\nd 'e\nf' | g &\n"
    assert list(commands(text)) == [["python", "-m", "x", "--a", "b"], ["c"], ["sleep", "1"], ["d", "e\nf"], ["g"]]


def test_no_page_installs_the_package_of_another_project() -> None:
    for page in markdown_pages():
        assert not re.search(r"pip install\S* '?slipway\b(?!-)", page.read_text(encoding="utf-8")), page


def runnable(page: Path) -> list[Block]:
    """The blocks of a page that a reader can paste, without those that a marker takes out."""
    kinds = ("bash", "python")
    return [block for block in blocks_of(page) if block.language in kinds and not block.reason and not block.title]


def prints_files(page: Path) -> bool:
    """Whether a page prints files of a plug-in; test_examples.py then runs its commands in a copy with these files."""
    return any(block.title for block in blocks_of(page))


PAGES = [
    page for page in markdown_pages() if MEASUREMENTS not in page.parents and runnable(page) and not prints_files(page)
]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Variables with which `slipway` and `python` are those of this checkout, in any folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    commands = {"slipway": f"{sys.executable} -m slipway", "python": sys.executable}
    if make := shutil.which("make"):
        commands["make"] = f"{make} -C {ROOT}"
    for name, command in commands.items():
        (folder / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run_bounded(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, str, str]:
    """(status, stdout, stderr) of a command; no process of its session is left after RUN_LIMIT_S."""
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            printed, errors = process.communicate(timeout=RUN_LIMIT_S)
            return process.returncode, printed, errors
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page_run_in_order(page: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    for block in runnable(page):
        if block.serves and (reason := no_server()):
            pytest.skip(reason)
        shell = ["bash", "-euo", "pipefail", "-c", block.text]
        command = shell if block.language == "bash" else [sys.executable, "-c", block.text]
        status, printed, errors = run_bounded(command, folder, environment)
        assert status == 0, f"{block.place}\n{printed[-1500:]}\n{errors[-1500:]}"

"""`pip install .` without extras in an empty environment: complete, every help works, errors name the extra."""

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from slipway.command import MODULES

ROOT = Path(__file__).parents[2]
PACKAGES = ("slipway", "runtimes", "training", "export")
SOURCES = (*PACKAGES, "pyproject.toml", "README.md", "LICENSE")
OFFLINE = re.compile(
    r"Could not find a version|No matching distribution|Failed to establish|Connection|timed out", re.I
)
COMMANDS = [
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__main__")
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
    if "\n@command\n" in path.read_text() and path.stem != "command"
]

pytestmark = pytest.mark.slow


def pip(*arguments: str) -> None:
    """Run pip; the test is skipped where pip cannot download."""
    ran = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    if ran.returncode:
        errors = " ".join(ran.stderr.split())
        if OFFLINE.search(errors):
            pytest.skip(f"pip cannot download: {errors[-200:]}")
        pytest.fail(errors[-2000:])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source)
    pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source))
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder with `python` and `slipway` of an environment that holds the wheel and its dependencies only."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    pip("--python", str(folder / "bin" / "python"), "install", "--quiet", str(wheel))
    yield folder / "bin"
    shutil.rmtree(folder)


def run(scripts: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """A command of that environment, outside of the checkout."""
    program, *rest = arguments
    return subprocess.run(
        [str(scripts / program), *rest],
        capture_output=True,
        text=True,
        check=False,
        cwd=scripts,
        env={"PATH": "/usr/bin:/bin"},
    )


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {f"{package}/py.typed" for package in PACKAGES} <= expected
    assert {"runtimes/bench/report.css", "runtimes/web/assets/index.html"} <= expected
    assert any(name.startswith("runtimes/triton/steps/") for name in expected)
    assert "\nName: slipway-triton\n" in metadata


def test_the_installed_command_has_the_version(scripts: Path) -> None:
    ran = run(scripts, "slipway", "--version")
    assert re.fullmatch(r"slipway \d+\.\d+\.\d+\n", ran.stdout), ran.stderr
    assert run(scripts, "python", "-m", "slipway", "--version").stdout == ran.stdout
    installed = "import importlib.metadata as m; print('slipway', m.version('slipway-triton'))"
    assert run(scripts, "python", "-c", installed).stdout == ran.stdout


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_subcommand_has_help(scripts: Path, name: str) -> None:
    ran = run(scripts, "slipway", name, "--help")
    assert ran.returncode == 0, ran.stderr[-500:]
    assert ran.stdout.startswith(f"usage: slipway {name} ")


@pytest.mark.parametrize("module", COMMANDS)
def test_every_module_has_help(scripts: Path, module: str) -> None:
    ran = run(scripts, "python", "-m", module, "--help")
    assert ran.returncode == 0, ran.stderr[-500:]
    assert ran.stdout.startswith(f"usage: python -m {module} ")


@pytest.mark.parametrize("package", PACKAGES[1:])
def test_every_package_lists_its_commands(scripts: Path, package: str) -> None:
    ran = run(scripts, "python", "-m", package)
    assert ran.returncode == 0, ran.stderr[-500:]
    assert f"python -m {package}." in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        ("train policy_gru --out checkpoints", "train"),
        ("sweep hnet", "plot"),
        ("precompute strategy --store stores", "(train|strategy)"),
    ],
)
def test_a_missing_extra_is_one_line_with_status_2(scripts: Path, arguments: str, extra: str) -> None:
    ran = run(scripts, "slipway", *arguments.split())
    assert ran.returncode == 2, ran.stderr[-500:]
    assert re.fullmatch(rf"error: expected package '\w+', found none .*pip install '\.\[{extra}\]'\n", ran.stderr)


def test_an_installed_package_can_be_typed_and_used(scripts: Path) -> None:
    code = "import slipway; slipway.load('policy_gru')"
    ran = run(scripts, "python", "-c", code)
    assert ran.stderr.splitlines()[-1].startswith("runtimes.errors.InputError: expected ")


def test_list_works_without_extras(scripts: Path) -> None:
    ran = run(scripts, "slipway", "list")
    assert ran.returncode == 0, ran.stderr[-500:]
    assert "policy_gru" in ran.stdout

"""The house keeps its shape: imports go down only, plug-ins know no sibling, files and functions stay small."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("runtimes", "training", "export", "slipway")
PLUG_IN_FOLDERS = ("runtimes/engines", "runtimes/pipelines", "training/models", "export/targets")
# Scripts that Triton runs, in its own interpreter; they are data to this package.
SCRIPTS = ("runtimes/triton/backends", "runtimes/triton/steps")
FILE_LINES, FUNCTION_LINES = 400, 60
GROUND = ("numpy", *FLOORS[:1])


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def wrong_way(floor: str, imported: str) -> bool:
    top = imported.partition(".")[0]
    return top in FLOORS and FLOORS.index(top) > FLOORS.index(floor)


@pytest.mark.parametrize("path", sources(*FLOORS), ids=module_of)
def test_imports_go_down_only(path: Path) -> None:
    floor = path.relative_to(ROOT).parts[0]
    assert [name for name in imports(ast.parse(path.read_text())) if wrong_way(floor, name)] == []


def test_an_import_that_goes_up_would_be_seen() -> None:
    planted = ast.parse("def f():\n    from export.source import Source")
    assert any(wrong_way("runtimes", name) for name in imports(planted))


def plug_in_of(module: str) -> tuple[str, str] | None:
    """(folder, plug-in) of a module inside a plug-in folder."""
    for folder in PLUG_IN_FOLDERS:
        prefix = folder.replace("/", ".") + "."
        if module.startswith(prefix):
            return folder, module.removeprefix(prefix).partition(".")[0]
    return None


@pytest.mark.parametrize("path", sources(*PLUG_IN_FOLDERS), ids=module_of)
def test_a_plug_in_knows_no_sibling(path: Path) -> None:
    own = plug_in_of(module_of(path))
    others = {plug_in_of(name) for name in imports(ast.parse(path.read_text()))} - {None, own}
    assert [other for other in others if own and other and other[0] == own[0]] == []


@pytest.mark.parametrize("path", sources(*FLOORS, "tests"), ids=module_of)
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno
        and node.end_lineno - node.lineno >= FUNCTION_LINES
    ]
    assert long == []
    assert text.count("\n") <= FILE_LINES


# torch.export.load also: a program is read by runtimes.torch_program, which looks into it first.
UNPICKLING = ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load", "torch.export.load", "torch.jit.load")


@pytest.mark.parametrize("path", sources(*FLOORS), ids=module_of)
def test_nothing_is_swallowed_and_no_pickle_is_read(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"bare except in line {node.lineno}"
            wide = ast.unparse(node.type) in ("Exception", "BaseException")
            passed_on = any(isinstance(inner, ast.Raise) and inner.exc is None for inner in ast.walk(node))
            assert passed_on or not wide, f"line {node.lineno}"
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in UNPICKLING, f"line {node.lineno}"
            unsafe = {keyword.arg for keyword in node.keywords} & {"allow_pickle", "trust_remote_code", "weights_only"}
            assert not unsafe, f"line {node.lineno}"


BARE = """
import importlib, sys
class Bare:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top in {allowed!r}:
            return None
        raise ModuleNotFoundError(f"{{name}} is not in a bare environment", name=top)
sys.meta_path.insert(0, Bare())
sys.path.insert(0, {root!r})
importlib.import_module({module!r})
"""


@pytest.mark.parametrize(
    "module", [module_of(p) for p in sources("runtimes") if not any(s in p.as_posix() for s in SCRIPTS)]
)
def test_every_module_of_the_ground_floor_imports_with_numpy_alone(module: str) -> None:
    code = BARE.format(allowed=(*GROUND, "safetensors", "tqdm"), root=str(ROOT), module=module)
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert asked.returncode == 0, asked.stderr[-500:]


def test_the_bare_environment_is_bare() -> None:
    code = BARE.format(allowed=(*GROUND, "training"), root=str(ROOT), module="training.layers.scan")
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "torch is not in a bare environment" in asked.stderr

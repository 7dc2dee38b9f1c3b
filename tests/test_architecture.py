"""The house keeps its shape: imports go down only, plug-ins know no sibling, files and functions stay small."""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("runtimes", "training", "export", "slipway")
PLUG_IN_FOLDERS = ("runtimes/engines", "runtimes/pipelines", "training/models", "export/targets")
# Scripts that Triton runs, in its own interpreter; they are data to this package.
SCRIPTS = ("runtimes/triton/backends", "runtimes/triton/steps")
FILE_LINES, FUNCTION_LINES, FOLDER_FILES = 400, 60, 20
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


def circles(trees: Mapping[str, ast.AST]) -> list[list[str]]:
    """The modules that import each other, anywhere in them: at the top, in a function, for types."""
    graph = networkx.DiGraph()
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                graph.add_edges_from((module, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [(f"{node.module}.{alias.name}", node.module) for alias in node.names]
                graph.add_edges_from((module, name if name in trees else package) for name, package in names)
    return sorted(sorted(each) for each in networkx.strongly_connected_components(graph) if len(each) > 1)


def test_no_modules_import_each_other() -> None:
    trees = {module_of(path): ast.parse(path.read_text()) for path in sources(*FLOORS)}
    assert circles(trees) == []


@pytest.mark.parametrize(
    "back",
    ["from a import one", "def f():\n    from a import one", "if TYPE_CHECKING:\n    import a"],
    ids=["top", "lazy", "types"],
)
def test_a_planted_circle_is_found(back: str) -> None:
    planted = {"a": "from b.c import two", "b": "", "b.c": "import d", "d": back, "e": "import a"}
    trees = {name: ast.parse(text) for name, text in planted.items()}
    assert circles(trees) == [["a", "b.c", "d"]]
    assert circles({**trees, "d": ast.parse("")}) == []


def crowded(root: Path, packages: Sequence[str]) -> list[str]:
    """The modules over FILE_LINES lines, and the folders with more than FOLDER_FILES modules."""
    paths = [path for package in packages for path in sorted((root / package).rglob("*.py"))]
    lines = {path.relative_to(root): path.read_text().count("\n") for path in paths}
    found = [f"{path}: {count} lines" for path, count in lines.items() if count > FILE_LINES]
    files = Counter(path.parent for path in lines)
    return found + [f"{folder}: {count} files" for folder, count in files.items() if count > FOLDER_FILES]


def test_no_folder_is_crowded_and_no_file_is_long() -> None:
    assert crowded(ROOT, (*FLOORS, "slipway")) == []


def test_a_crowded_folder_and_a_long_file_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "training" / "layers"
    folder.mkdir(parents=True)
    for i in range(FOLDER_FILES):
        (folder / f"file{i}.py").write_text("\n" * FILE_LINES)
    assert crowded(tmp_path, ("training",)) == []
    (folder / "one_more.py").write_text("\n" * (FILE_LINES + 1))
    assert crowded(tmp_path, ("training",)) == ["training/layers/one_more.py: 401 lines", "training/layers: 21 files"]


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

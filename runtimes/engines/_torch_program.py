"""Programs of torch.export in files: graph and tensors are read, nothing is unpickled, evaluated or imported.

`torch.export.load` (2.11 to 2.13) unpickles the inputs that a program was traced with, records marked `use_pickle`
and records with a name of an older format. It loads the libraries in the archive, evaluates the sizes in the graph with
sympy, writes names of the graph into Python source, imports modules that its trees name, and has operators that open
files.
So `load` first compares the records of the archive, by torch's own reader, with a list of allowed ones.
Source: torch/export/pt2_archive/_package.py and torch/_export/serde/serialize.py.
"""

import ast
import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtimes.errors import ArtifactError, one_line, require

if TYPE_CHECKING:
    from torch.export import ExportedProgram

GRAPH = "models/model.json"
EXAMPLE = "data/sample_inputs/model.pt"
# The names of the tensors, by the record that lists them.
TENSORS = {
    "data/weights/model_weights_config.json": re.compile(r"weight_\d+"),
    "data/constants/model_constants_config.json": re.compile(r"tensor_\d+"),
}
RECORD = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|data/(weights/weight|constants/tensor)_\d+"
)
RECORDS = {GRAPH, EXAMPLE, *TENSORS}

NAME = re.compile(r"[A-Za-z_]\w*|", re.ASCII)
# `save` and `from_file` are the two operators of ATen that touch files.
OPERATOR = re.compile(
    r"torch\.ops\.aten\.(?!(?:save|from_file)\.)(?:_?[a-zA-Z]\w*|__i?(?:and|or|xor|lshift|rshift)__)\.[a-zA-Z]\w*"
    r"|torch\.ops\.higher_order\.(?:associative_scan|cond|map_impl|scan|while_loop)"
    r"|torch\.(?:_sym_sqrt|sym_(?:float|int|ite|max|min|not))|math\.trunc"
    r"|_operator\.(?:add|and_|eq|floordiv|ge|gt|le|lshift|lt|mod|mul|ne|neg|or_|pos|pow|rshift|sub|truediv)",
    re.ASCII,
)
SYMBOL = re.compile(r"[a-z]+\d+|-?[\d.]+(?:e-?\d+)?", re.ASCII)
ARITHMETIC = re.compile(
    r"Symbol|Integer|Rational|Float|Add|Mul|Pow|Max|Min|Abs|And|Or|Not|Equality|Unequality|(?:Strict)?(?:Less|Greater)Than"
    r"|FloorDiv|ModularIndexing|Where|PythonMod|Mod|CleanDiv|Ceil(?:Div|ToInt)|FloorToInt|[LR]Shift|PowByNatural|FloatPow"
    r"|(?:Float|Int)TrueDiv|TruncTo(?:Float|Int)|Round(?:ToInt|Decimal)|ToFloat|Identity"
)
SYNTAX = (ast.Expression, ast.Call, ast.keyword, ast.UnaryOp, ast.USub, ast.Load)
CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict")  # None is a leaf
MALFORMED = (AssertionError, AttributeError, LookupError, RuntimeError, SyntaxError, TypeError, ValueError)
FREE_KEYS = {  # of the graph: where the keys below are names that the model chose
    "as_string_to_argument",
    "custom_obj_values",
    "metadata",
    "range_constraints",
    "sym_bool_values",
    "sym_float_values",
    "sym_int_values",
    "tensor_values",
}


def save(program: "ExportedProgram", path: Path) -> None:
    """The program is in the file, and has lost the inputs it was traced with: a pickle, and often the larger part."""
    torch = require("torch", extra="export")
    program.example_inputs = None
    torch.export.save(program, path)


def load(path: Path) -> "ExportedProgram":
    """The program in the file; `ArtifactError` if torch would do more with it than read a graph and tensors."""
    require("torch", extra="export")
    # Not torch.export.load: it takes an archive that it cannot read for the format of 2.7, which is a pickle.
    from torch.export.pt2_archive._package import load_pt2

    try:
        for found in strangers(path):
            raise ArtifactError(
                f"{path}: expected a program of tensors and operators alone, found {found}; export it again"
            )
        program: ExportedProgram = load_pt2(str(path)).exported_programs["model"]
    except MALFORMED as error:
        raise ArtifactError(f"{path}: expected a program, found {one_line(error)}; export it again") from error
    return program


def strangers(path: Path) -> Iterator[str]:
    """The contents of the archive that are not allowed."""
    from torch.export.pt2_archive import PT2ArchiveReader

    reader = PT2ArchiveReader(str(path))
    for name in reader.get_file_names():
        if name not in RECORDS and not RECORD.fullmatch(name):
            yield f"the record {ascii(name)[:80]}"
    if size := len(reader.read_bytes(EXAMPLE)):
        yield f"{size} bytes of example inputs, which are a pickle"
    for listing, tensor in TENSORS.items():
        for meant in json.loads(reader.read_string(listing))["config"].values():
            if meant["use_pickle"] is not False or not tensor.fullmatch(meant["path_name"]):
                yield f"the pickle {ascii(meant['path_name'])[:80]}"
    for key, text in read_as_more(json.loads(reader.read_string(GRAPH))):
        if text is not None and not (isinstance(text, str) and ALLOWED[key](text)):
            yield f"the {key} {ascii(text)[:80]}"


def read_as_more(part: Any) -> Iterator[tuple[str, Any]]:
    """Everything in the JSON of a graph that torch takes for more than a text, and the key it is under."""
    if isinstance(part, list):
        for each in part:
            yield from read_as_more(each)
    elif isinstance(part, dict):
        for key, value in part.items():
            if key in ALLOWED:
                yield key, value
            elif key in FREE_KEYS and isinstance(value, dict):
                yield from read_as_more(list(value.values()))
            else:
                yield from read_as_more(value)


@cache
def is_arithmetic(text: str) -> bool:
    """Whether the text is a size in sympy's words, such as "Add(Symbol('s29', integer=True), Integer(3))"."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except SyntaxError:
        return False
    return text.isascii() and all(map(is_number, nodes))


def is_number(node: ast.AST) -> bool:
    """Whether this piece of Python's syntax is one of arithmetic."""
    if isinstance(node, ast.Constant):
        value = node.value
        return bool(SYMBOL.fullmatch(value)) if isinstance(value, str) else isinstance(value, int | float)
    return bool(ARITHMETIC.fullmatch(node.id)) if isinstance(node, ast.Name) else isinstance(node, SYNTAX)


def is_plain(tree: Any) -> bool:
    """Whether a tree has tuples, lists and dicts alone: other kinds may name a module, and torch imports it."""
    keys = json.loads(tree["context"]) if tree["context"] else None
    known = keys is None or (isinstance(keys, list) and all(isinstance(key, str) for key in keys))
    return known and tree["type"] in CONTAINERS and all(map(is_plain, tree["children_spec"]))


ALLOWED: dict[str, Callable[[str], object]] = {
    "name": NAME.fullmatch,
    "as_name": NAME.fullmatch,
    "target": OPERATOR.fullmatch,
    "as_operator": OPERATOR.fullmatch,
    "expr_str": is_arithmetic,
    "in_spec": lambda text: is_plain(json.loads(text)[1]),
    "out_spec": lambda text: is_plain(json.loads(text)[1]),
}

"""The exported torch program, eager or compiled: the baseline of the benchmark."""

import copy
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from export.source import OPERATOR, Source
from export.target import Built, Target
from runtimes import torch_program
from runtimes.engines.torch import PROGRAM_FILE, STEP_FILE
from training.layers.form import Form

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node


def convert(source: Source, precision: str, out: Path) -> Built:
    """Write the program; for a recurrent model also its single step, which has no loop."""
    torch_program.save(tidy(source.program(OPERATOR, precision)), out / PROGRAM_FILE)
    if source.signature.state and any(axis.name == "time" for axis in source.signature.axes):
        step = source.program(Form(kind="loop"), precision, {"time": 1})
        torch_program.save(tidy(step), out / STEP_FILE)
    return Built(built_with={}, served=False)


def tidy(program: "ExportedProgram") -> "ExportedProgram":
    """The program without checks, casts and dropouts that have no effect, and with its recurrent cells by name.

    A program as it is traced runs at half the speed of its module, and most of that time goes into constant checks.
    """
    from training.layers.rnn import name_cells

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch warns about its own tree specs when they are copied
        program = name_cells(copy.deepcopy(program))
    for node in list(program.graph.nodes):
        name = str(node.target)
        if name.startswith("aten._assert"):
            program.graph.erase_node(node)
        elif name == "aten.dropout.default" or (
            name == "aten.to.dtype" and node.args[0].meta["val"].dtype == node.args[1]
        ):
            _bypass(program, node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def _bypass(program: "ExportedProgram", node: "Node") -> None:
    """Every reader of `node` reads its input instead; outputs of the program are renamed with it."""
    from torch.fx import Node

    source = node.args[0]
    assert isinstance(source, Node)
    node.replace_all_uses_with(source)
    for spec in program.graph_signature.output_specs:
        if spec.arg.name == node.name:
            spec.arg.name = source.name
    program.graph.erase_node(node)


TARGET = Target(
    name="torch",
    runtime="torch",
    precisions=("fp32", "fp16", "bf16"),
    packages=("torch",),
    convert=convert,
)

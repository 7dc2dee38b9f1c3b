"""The `slipway` command: its subcommands are the modules that also run as `python -m MODULE`."""

import importlib
import sys
from types import ModuleType

import slipway
from runtimes.errors import InputError
from runtimes.host.cli import command, program, unknown_name

GROUPS = {
    "models": {
        "train": ("training.run", "Train models and write their checkpoints."),
        "evaluate": ("training.evaluate", "Compute the metrics of a checkpoint and of baselines."),
        "precompute": ("training.precompute", "Store the outputs of frozen parts, or embed a collection."),
        "sweep": ("training.sweep", "Run the experiments of a model and compare them."),
    },
    "artifacts": {
        "export": ("export.all", "Convert checkpoints, verify the result and publish it."),
        "list": ("slipway.inventory", "List models, their checkpoints and their published artifacts."),
        "verify": ("export.verify", "Check digests, configuration and parity of a model repository."),
    },
    "answers": {
        "predict": ("runtimes.predict", "Answer a request with a published artifact."),
        "generate": ("runtimes.generate", "Generate an answer to a prompt token by token."),
        "serve": ("runtimes.serve", "Serve a model repository with Triton."),
        "search": ("runtimes.search.__main__", "Find the statements of a collection that are closest to a text."),
        "web": ("runtimes.web.__main__", "Serve a web page that searches collections."),
    },
    "measurements": {
        "bench": ("runtimes.bench.__main__", "Measure published artifacts beside torch."),
        "compare": ("runtimes.compare", "Compare the speed of two repositories, checkouts or results files."),
        "report": ("runtimes.report", "Render a results file as HTML or Markdown."),
        "advise": ("runtimes.advise", "Recommend an engine and a precision from measured results."),
        "matrix": ("runtimes.matrix", "Render the table of models and targets."),
        "soak": ("runtimes.soak", "Run a server under load and check answers and memory."),
    },
}
LAYERS = ("training", "export")  # packages of this distribution that an image for serving leaves out
MODULES = {name: module for group in GROUPS.values() for name, (module, _) in group.items()}


@command
def main(argv: list[str] | None = None) -> int:
    """Run a subcommand and return its exit status; 2 for an unknown one. Only the subcommand's module is imported."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if name == "--version":
        print(f"slipway {slipway.__version__}")
        return 0
    if not name:
        print(help_text(), file=sys.stderr)
        return InputError.exit_status
    if name not in MODULES:
        raise unknown_name("command", name, MODULES, "list them: slipway --help")
    token = program.set(f"slipway {name}")
    try:
        return int(_import(name).main(arguments))
    finally:
        program.reset(token)


def help_text() -> str:
    """The usage, and the subcommands by group."""
    width = max(map(len, MODULES))
    lines = [
        "usage: slipway COMMAND ...",
        "",
        f"slipway {slipway.__version__}: verified conversion, serving and measurement of trained models.",
    ]
    for group, own in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {name:{width}}  {summary}" for name, (_, summary) in own.items())]
    lines += [
        "",
        f"{'slipway COMMAND --help':{width + 14}}  options and examples of a command",
        f"{'slipway --version':{width + 14}}  the version",
    ]
    return "\n".join(lines)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(MODULES[name])
    except ModuleNotFoundError as error:
        if error.name not in LAYERS:
            raise
        raise InputError(
            f"expected package '{error.name}' for slipway {name}, found none: a part of slipway is installed; "
            "install all of it in a checkout: pip install ."
        ) from error

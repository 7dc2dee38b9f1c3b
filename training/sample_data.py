"""Write small synthetic data files in the form that --data reads: python -m training.sample_data MODEL..."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtimes import plugins
from runtimes.errors import InputError
from runtimes.host.cli import command, models_argument, parser, unknown_name

Writer = Callable[[Path, int], list[Path]]


@command
def main(argv: list[str] | None = None) -> int:
    """Write the files of every named model package and print their paths."""
    arguments = _parser().parse_args(argv)
    for package in arguments.models:
        write = writer_of(package)
        folder = arguments.out / package
        folder.mkdir(parents=True, exist_ok=True)
        for path in write(folder, arguments.seed):
            print(path)
    return 0


def writer_of(package: str) -> Writer:
    """The package's `data.write_sample`; `InputError` for an unknown package and for one that writes no sample."""
    known = plugins.names("training.models")
    if package not in known:
        raise unknown_name("model package", package, known, "the packages are the folders of training/models")
    module = importlib.import_module(f"training.models.{package}.data")
    write: Writer | None = getattr(module, "write_sample", None)
    if write is None:
        raise InputError(
            f"expected a model package that writes sample data, found '{package}'; "
            "without --data every model trains on synthetic data"
        )
    return write


def _parser() -> Any:
    result = parser(
        "training.sample_data",
        __doc__.partition(":")[0] + ".",
        "strategy --out data",
        "strategy hallucination statements hnet",
    )
    models_argument(result, "model packages, such as strategy", least=1)
    result.add_argument("--out", type=Path, default=Path("data"), help="folder of the files (default: %(default)s)")
    result.add_argument("--seed", type=int, default=0, help="seed of the random numbers (default: %(default)s)")
    return result


if __name__ == "__main__":
    sys.exit(main())

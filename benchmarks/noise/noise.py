"""Count the wrong verdicts of runtimes.compare on this machine: python -m benchmarks.noise.noise

NEW is a copy of this checkout, compared with itself. In a planted comparison, its engine of ONNX Runtime waits after
every call for a fifth of the time of the call. Prints one line for each comparison, with the load of the machine.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from runtimes.compare import CLOCKS
from runtimes.errors import EngineError
from runtimes.host.cli import command, models_argument, parser, repository_argument

ROOT = Path(__file__).parents[2]
CALL = "        return dict(zip(names, self.guarded(lambda: self.session.run(names, dict(inputs))), strict=True))\n"
SLOWED = """        began = perf_counter()
        printed = dict(zip(names, self.guarded(lambda: self.session.run(names, dict(inputs))), strict=True))
        until = perf_counter() + {share} * (perf_counter() - began)
        while perf_counter() < until:
            pass
        return printed
"""


def copy_checkout(folder: Path, repository: Path, share: float) -> Path:
    """A checkout in `folder` whose calls of ONNX Runtime take this share longer, with the artifacts of `repository`."""
    shutil.copytree(ROOT / "runtimes", folder / "runtimes", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "model_repository").symlink_to(repository.absolute())
    engine = folder / "runtimes" / "engines" / "onnxruntime.py"
    source = engine.read_text()
    if source.count(CALL) != 1:
        raise EngineError(f"{engine}: expected the call of the session as in CALL once, found another; update CALL")
    if share:
        slowed = source.replace(CALL, SLOWED.format(share=share)).replace(
            "from collections.abc", "from time import perf_counter\nfrom collections.abc", 1
        )
        engine.write_text(slowed)
    return folder


def compare(base: Path, new: Path, arguments: Any) -> dict[str, Any]:
    """The one cell of a comparison, with its exit status and the load before it."""
    load = os.getloadavg()[0]
    command = [sys.executable, "-m", "runtimes.compare", base, new, arguments.model, "--target", "onnx", "--json"]
    command += ["--runs", str(arguments.runs), "--seconds", str(arguments.seconds), "--clock", arguments.clock]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if ended.returncode not in (0, 1):
        raise EngineError(f"runtimes.compare: expected status 0 or 1, found {ended.returncode}: {ended.stderr}")
    cells = [cell for cell in json.loads(ended.stdout)["cells"] if cell["engine"] == "onnx"]
    return {**cells[0], "status": ended.returncode, "load": load}


def line(kind: str, number: int, found: dict[str, Any]) -> str:
    share = {name: f"{100 * value:+.1f} %" for name, value in found["difference"].items()}
    interval = f"{share['low']} .. {share['high']}"
    cells = (
        kind,
        number,
        share["slower"],
        interval,
        share["floor"].lstrip("+"),
        f"{found['load']:.1f}",
        found["verdict"],
    )
    return f"| {' | '.join(map(str, cells))} |"


@command
def main(argv: list[str] | None = None) -> int:
    """Print a line for each comparison; with --out keep them all."""
    arguments = _parser().parse_args(argv)
    print("| NEW | no. | slower | 95 % interval | A/A floor | load | verdict |\n|---|--:|--:|---|--:|--:|---|")
    kept = []
    with tempfile.TemporaryDirectory() as scratch:
        base = copy_checkout(Path(scratch, "base"), arguments.repository, 0.0)
        for i, (kind, share) in enumerate(kinds(arguments)):
            new = copy_checkout(Path(scratch, f"new{i}"), arguments.repository, share)
            found = compare(base, new, arguments)
            kept.append({"kind": kind, **found})
            print(line(kind, i + 1, found), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(kept, indent=1) + "\n")
    return 0


def kinds(arguments: Any) -> list[tuple[str, float]]:
    """(name, planted share) of every comparison; the planted ones are spread evenly over the others."""
    count, planted = arguments.comparisons, arguments.planted
    places = {(i * count) // planted for i in range(planted)} if planted else set()
    slower, same = (f"{arguments.share:.0%} slower", arguments.share), ("the same", 0.0)
    return [kind for i in range(count) for kind in ([slower, same] if i in places else [same])]


def _parser() -> Any:
    result = parser(
        "benchmarks.noise.noise",
        __doc__.partition(": python")[0] + ".",
        "strategy_encoder",
        "strategy_encoder --comparisons 20 --planted 3 --out noise.json",
    )
    models_argument(result, "the published model", least=1, most=1)
    repository_argument(result)
    result.add_argument("--comparisons", type=int, default=20, help="comparisons with itself (default: %(default)s)")
    result.add_argument("--planted", type=int, default=3, help="comparisons with a slowdown (default: %(default)s)")
    result.add_argument("--share", type=float, default=0.2, help="planted slowdown (default: %(default)s)")
    result.add_argument("--runs", type=int, default=10, help="runs of each comparison (default: %(default)s)")
    result.add_argument("--seconds", type=float, default=0.3, help="length of a window (default: %(default)s)")
    result.add_argument("--clock", choices=CLOCKS, default="wall", help="of runtimes.compare (default: %(default)s)")
    result.add_argument("--out", type=Path, help="keep all comparisons in this file (default: none)")
    return result


if __name__ == "__main__":
    sys.exit(main())

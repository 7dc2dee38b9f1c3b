"""How often is runtimes.compare wrong on this machine? A thing against itself, and against itself a fifth slower.

    PYTHONPATH=. python benchmarks/noise/noise.py --model strategy_encoder --comparisons 20 --planted 3 --out noise.json

NEW is a copy of this checkout. Planted: after every call its engine of ONNX Runtime computes nothing for a fifth of the
time that the call took. Nothing else differs. One line a comparison, with the load of the machine.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

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
    """A checkout in `folder` whose ONNX Runtime takes this share longer; its artifacts are those of `repository`."""
    shutil.copytree(ROOT / "runtimes", folder / "runtimes", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "model_repository").symlink_to(repository.absolute())
    engine = folder / "runtimes" / "engines" / "onnxruntime.py"
    source = engine.read_text()
    if source.count(CALL) != 1:
        raise SystemExit(f"{engine}: expected the call of the session once, as this script knows it")
    if share:
        slowed = source.replace(CALL, SLOWED.format(share=share)).replace(
            "from collections.abc", "from time import perf_counter\nfrom collections.abc", 1
        )
        engine.write_text(slowed)
    return folder


def compare(base: Path, new: Path, given: argparse.Namespace) -> dict[str, Any]:
    """The one cell of a comparison, with its exit status and the load before it."""
    load = os.getloadavg()[0]
    command = [sys.executable, "-m", "runtimes.compare", base, new, "--model", given.model, "--target", "onnx"]
    command += ["--runs", str(given.runs), "--seconds", str(given.seconds), "--clock", given.clock, "--json"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if asked.returncode not in (0, 1):
        raise SystemExit(asked.stderr)
    cells = [cell for cell in json.loads(asked.stdout)["cells"] if cell["engine"] == "onnx"]
    return {**cells[0], "status": asked.returncode, "load": load}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="strategy_encoder")
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--comparisons", type=int, default=20)
    parser.add_argument("--planted", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    print("| NEW | no. | slower | 95 % interval | A/A floor | load | verdict |\n|---|--:|--:|---|--:|--:|---|")
    kept = []
    with tempfile.TemporaryDirectory() as scratch:
        base = copy_checkout(Path(scratch, "base"), given.repository, 0.0)
        planted = {(i * given.comparisons) // given.planted for i in range(given.planted)} if given.planted else set()
        kinds: list[tuple[str, float]] = []
        for i in range(given.comparisons):  # the planted ones are spread over the time that this takes
            kinds += [(f"{given.share:.0%} slower", given.share)] * (i in planted) + [("the same", 0.0)]
        for i, (kind, share) in enumerate(kinds):
            new = copy_checkout(Path(scratch, f"new{i}"), given.repository, share)
            found = compare(base, new, given)
            kept.append({"kind": kind, **found})
            print(line(kind, i + 1, found), flush=True)
    if given.out:
        given.out.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()

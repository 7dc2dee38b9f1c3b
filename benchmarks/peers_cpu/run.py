"""Compare a sentence embedder in other libraries with Slipway's artifacts: python -m benchmarks.peers_cpu.run FOLDER

    python -m benchmarks.peers_cpu.prepare --base FOLDER --out peers
    python -m export.all statements --target onnx,openvino --precision fp32,int8 \\
      --checkpoints peers/checkpoints --repository peers/model_repository
    python -m benchmarks.peers_cpu.run peers --json peers.json

`make peers` makes the environments of the peers; variants without their environment are left out and listed. Every
variant is one process for the whole run; within each repeat they alternate. Times are end to end, from text to unit
vectors: 48 texts at batch 1 (b1), and 256 texts in batches of 32 of about the same length (b32).
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers_cpu.variants import ROOT, SINGLE, SORTED, VARIANTS
from runtimes.host.cli import command, parser

NEIGHBOURS = 10


class Process:
    """A variant in a process of its own environment."""

    def __init__(self, folder: Path, name: str, threads: int, repository: Path) -> None:
        self.name = name
        python = ROOT / VARIANTS[name].venv / "bin" / "python"
        limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), str(threads))
        environment = {**os.environ, **limits, "PEERS_REPOSITORY": str(repository), "HF_HUB_OFFLINE": "1"}
        environment["TOKENIZERS_PARALLELISM"] = "false"
        self.log = (folder / f"{name.replace(' ', '_').replace(',', '')}.log").open("w")
        self.process = subprocess.Popen(
            [python, ROOT / "benchmarks/peers_cpu/variants.py", folder, name, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )

    def seconds_of(self, task: str) -> float | None:
        """Seconds of the task, or None if the process has died."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(task, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            return None
        line = self.process.stdout.readline()
        return float(json.loads(line)) if line else None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


def run(folder: Path, repository: Path, threads: int, repeats: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each variant that could be run: sentences a second, as a multiple of the first, and fidelity."""
    alive: list[Process] = []
    seconds: dict[str, dict[str, list[float]]] = {}
    vectors: dict[str, np.ndarray] = {}
    try:
        for name in names:
            if not (ROOT / VARIANTS[name].venv).is_dir():
                continue
            started = Process(folder, name, threads, repository)
            alive.append(started)
            answers = folder / f"{started.process.pid}.npy"
            if started.seconds_of(f"embed {answers}") is None:
                alive.remove(started)
                print(f"left out: {name} failed, see {started.log.name}", file=sys.stderr)
                continue
            seconds[name], vectors[name] = {"b1": [], "b32": []}, np.load(answers)
        for repeat in range(repeats + 1):
            for task in ("b1", "b32"):
                for process in alive:
                    taken = process.seconds_of(task)
                    if repeat and taken:  # the first is a warm-up
                        seconds[process.name][task].append(taken)
    finally:
        for process in alive:
            process.close()
    return [row(name, names[0], seconds, vectors) for name in seconds]


def row(
    name: str, base_name: str, seconds: dict[str, dict[str, list[float]]], vectors: dict[str, np.ndarray]
) -> dict[str, Any]:
    """A variant beside the base, the variant of the first row."""
    found: dict[str, Any] = {"variant": name, "int8": VARIANTS[name].int8}
    for task, texts in (("b1", SINGLE), ("b32", SORTED)):
        own, base = np.array(seconds[name][task]), np.array(seconds[base_name][task])
        found[f"{task}_per_s"] = texts / float(np.median(own))
        found[f"{task}_times"] = float(np.median(base / own))
    one, other = vectors[name], vectors[base_name]
    found["cosine_min"] = float(((one * other).sum(1) / np.linalg.norm(one, axis=1)).min())
    near, wanted = nearest(one), nearest(other)
    found["top10"] = float(np.mean([len(set(a) & set(b)) / NEIGHBOURS for a, b in zip(near, wanted, strict=True)]))
    return found


def nearest(vectors: np.ndarray) -> np.ndarray:
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -np.inf)
    return np.argsort(-scores, 1)[:, :NEIGHBOURS]


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| variant | b1 /s | x | b32 /s | x | top-10 overlap | smallest cosine |", "|---|--:|--:|--:|--:|--:|--:|"]
    for each in rows:
        speed = (f"{each[f'{task}_per_s']:.0f} | {each[f'{task}_times']:.2f}" for task in ("b1", "b32"))
        lines.append(f"| {each['variant']} | {' | '.join(speed)} | {each['top10']:.3f} | {each['cosine_min']:.4f} |")
    return "\n".join(lines)


@command
def main(argv: list[str] | None = None) -> int:
    """Print one table; with --json keep its rows."""
    arguments = _parser().parse_args(argv)
    folder = arguments.folder.resolve()
    names = arguments.variant or list(VARIANTS)
    rows = run(folder, folder / "model_repository", arguments.threads, arguments.repeats, names)
    print(as_table(rows))
    for missing in sorted({each.venv for each in VARIANTS.values() if not (ROOT / each.venv).is_dir()}):
        print(f"left out: the variants of {missing}; make it with: make peers")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def _parser() -> Any:
    result = parser(
        "benchmarks.peers_cpu.run",
        __doc__.partition(": python")[0] + ".",
        "peers",
        "peers --json peers.json",
    )
    result.add_argument("folder", type=Path, help="folder of benchmarks.peers_cpu.prepare, with the repository in it")
    result.add_argument("--threads", type=int, default=2, help="threads of each variant (default: %(default)s)")
    result.add_argument("--repeats", type=int, default=5, help="repeats of each task (default: %(default)s)")
    result.add_argument("--variant", action="append", choices=VARIANTS,
                        help="one to run, beside the first one given; repeated (default: all)")  # fmt: skip
    result.add_argument("--json", type=Path, help="keep the rows in this file (default: none)")
    return result


if __name__ == "__main__":
    sys.exit(main())

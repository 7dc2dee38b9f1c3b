"""Does runtimes.bench see what NVIDIA's perf_analyzer sees? One server, the same load, the two clients in turns.

    make perf-analyzer triton
    python -m export.all --target onnx --model strategy_encoder
    PYTHONPATH=. python benchmarks/perf_analyzer/run.py --model strategy_encoder --lanes 1 --lanes 2 --lanes 4

Both send the same request over gRPC, keep as many in flight, and report the median of the client's latency. Every round
asks each of them once, in a random order; a row gives the median over the rounds and the ratio within a round.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.artifact import Artifact
from runtimes.bench import wire
from runtimes.bench.measure import Worker
from runtimes.bench.plan import request_sizes
from runtimes.bench.worker import example_inputs
from runtimes.errors import EngineError, SlipwayError
from runtimes.repository import find
from runtimes.runtime import open_runtime
from runtimes.triton.server import TritonServer, find_bundle

HOME = Path(__file__).parents[2] / ".perf_analyzer"
WINDOWS = 3  # perf_analyzer reports its last three
AGREE = 0.15


def input_data(root: Path, path: Path) -> None:
    """The request of runtimes.bench in perf_analyzer's format is in `path`."""
    with open_runtime(root) as runtime:
        inputs = example_inputs(runtime, request_sizes(runtime.artifact))
    tensors = {name: {"content": a.ravel().tolist(), "shape": list(a.shape[1:])} for name, a in inputs.items()}
    path.write_text(json.dumps({"data": [tensors]}))


def peer_median_s(model: str, url: str, lanes: int, seconds: float, data: Path) -> float:
    """The median latency that perf_analyzer reports."""
    table = data.with_suffix(".csv")
    libraries = os.pathsep.join((str(HOME), str(find_bundle().site / "nvidia_pytriton.libs")))
    command = [HOME / "perf_analyzer", "-m", model, "-i", "grpc", "-u", url, "-b", "1", "-f", table]
    command += ["--input-data", data, "--concurrency-range", f"{lanes}:{lanes}", "--stability-percentage", "999"]
    command += ["--measurement-interval", f"{seconds * 1e3:.0f}", "--max-trials", str(WINDOWS)]
    asked = subprocess.run(
        command, env={**os.environ, "LD_LIBRARY_PATH": libraries}, capture_output=True, text=True, check=False
    )
    if asked.returncode:
        raise EngineError(f"perf_analyzer: expected status 0, found {asked.returncode}: {asked.stderr[-300:]}")
    with table.open() as lines:
        (found,) = csv.DictReader(lines)
    return float(found["p50 latency"]) * 1e-6


def own_median_s(worker: Worker, lanes: int, seconds: float) -> float:
    """The median latency over as many windows of the same length."""
    load = wire.concurrent(lanes, seconds)
    windows = [worker.window(load) for _ in range(WINDOWS)]
    return float(np.median([sample for window in windows for sample in window.samples_s]))


def rows(model: str, repository: Path, lanes: list[int], rounds: int, seconds: float) -> Iterator[dict[str, Any]]:
    """One row for each number in flight."""
    root = find(repository, f"{model}_onnx")
    name, rng = Artifact.load(root).name, np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder, TritonServer(repository, models=[name], open_to_all=True) as server:
        data = Path(folder) / "request.json"
        input_data(root, data)
        worker = Worker(root, {"engine": "triton", "url": server.grpc_url})
        try:
            worker.prepare(request_sizes(Artifact.load(root)))
            for count in lanes:
                own, peer = np.empty(rounds), np.empty(rounds)
                own_median_s(worker, count, seconds)  # a warm-up at this many in flight
                for i in range(rounds):
                    for which in rng.permutation(2):
                        if which:
                            peer[i] = peer_median_s(name, server.grpc_url, count, seconds, data)
                        else:
                            own[i] = own_median_s(worker, count, seconds)
                yield {"model": model, "lanes": count, "own_s": own.tolist(), "peer_s": peer.tolist()}
        finally:
            worker.close()


def line(row: dict[str, Any]) -> str:
    own, peer = np.array(row["own_s"]), np.array(row["peer_s"])
    ratio = float(np.median(own / peer))
    verdict = "yes" if abs(ratio - 1) <= AGREE else "no"
    cells = [row["model"], str(row["lanes"]), *(f"{np.median(each) * 1e3:.2f}" for each in (peer, own))]
    return f"| {' | '.join([*cells, f'{ratio:.2f}', verdict])} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--lanes", type=int, action="append", required=True)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--json", type=Path, help="keep the medians of every round in this file")
    given = parser.parse_args()
    found = []
    print("| model | in flight | perf_analyzer p50 ms | runtimes.bench p50 ms | ratio | within 15 % |")
    print("|---|--:|--:|--:|--:|---|")
    try:
        for model in given.model:
            for row in rows(model, given.repository, given.lanes, given.rounds, given.seconds):
                print(line(row), flush=True)
                found.append(row)
    except SlipwayError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\nload {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

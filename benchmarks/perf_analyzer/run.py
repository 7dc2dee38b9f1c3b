"""Compare runtimes.bench with NVIDIA's perf_analyzer on one server: python -m benchmarks.perf_analyzer.run

    make perf-analyzer triton
    python -m export.all strategy_encoder --target onnx
    python -m benchmarks.perf_analyzer.run strategy_encoder --concurrency 1 --concurrency 2 --concurrency 4

Both clients send the same request over gRPC, keep the same number in flight, and report the median of their latency.
Every round runs each client once, in a random order; a row gives the median over the rounds and the ratio within a
round.
"""

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
from runtimes.errors import EngineError
from runtimes.host.cli import command, hidden_alias, models_argument, parser, repository_argument
from runtimes.repository import find
from runtimes.runtime import open_runtime
from runtimes.triton.server import TritonServer, find_bundle

PEER_ROOT = Path(__file__).parents[2] / ".perf_analyzer"
WINDOWS = 3  # perf_analyzer reports its last three
AGREE = 0.15


def input_data(root: Path, path: Path) -> None:
    """The request of runtimes.bench in perf_analyzer's format is in `path`."""
    with open_runtime(root) as runtime:
        inputs = example_inputs(runtime, request_sizes(runtime.artifact))
    tensors = {name: {"content": a.ravel().tolist(), "shape": list(a.shape[1:])} for name, a in inputs.items()}
    path.write_text(json.dumps({"data": [tensors]}))


def peer_median_s(model: str, url: str, concurrency: int, seconds: float, data: Path) -> float:
    """The median latency that perf_analyzer reports."""
    table = data.with_suffix(".csv")
    libraries = os.pathsep.join((str(PEER_ROOT), str(find_bundle().site / "nvidia_pytriton.libs")))
    arguments = [PEER_ROOT / "perf_analyzer", "-m", model, "-i", "grpc", "-u", url, "-b", "1", "-f", table]
    arguments += [
        "--input-data",
        data,
        "--concurrency-range",
        f"{concurrency}:{concurrency}",
        "--stability-percentage",
        "999",
    ]
    arguments += ["--measurement-interval", f"{seconds * 1e3:.0f}", "--max-trials", str(WINDOWS)]
    ended = subprocess.run(
        arguments, env={**os.environ, "LD_LIBRARY_PATH": libraries}, capture_output=True, text=True, check=False
    )
    if ended.returncode:
        raise EngineError(f"perf_analyzer: expected status 0, found {ended.returncode}: {ended.stderr[-300:]}")
    with table.open() as lines:
        (found,) = csv.DictReader(lines)
    return float(found["p50 latency"]) * 1e-6


def own_median_s(worker: Worker, concurrency: int, seconds: float) -> float:
    """The median latency over as many windows of the same length."""
    load = wire.concurrent(concurrency, seconds)
    windows = [worker.window(load) for _ in range(WINDOWS)]
    return float(np.median([sample for window in windows for sample in window.samples_s]))


def rows(model: str, repository: Path, concurrency: list[int], rounds: int, seconds: float) -> Iterator[dict[str, Any]]:
    """One row for each number in flight."""
    root = find(repository, f"{model}_onnx")
    name, rng = Artifact.load(root).name, np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder, TritonServer(repository, models=[name], open_to_all=True) as server:
        data = Path(folder) / "request.json"
        input_data(root, data)
        worker = Worker(root, {"engine": "triton", "url": server.grpc_url})
        try:
            worker.prepare(request_sizes(Artifact.load(root)))
            for count in concurrency:
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


@command
def main(argv: list[str] | None = None) -> int:
    """Print a line for each model and number in flight; with --json keep the medians of every round."""
    arguments = _parser().parse_args(argv)
    print("| model | in flight | perf_analyzer p50 ms | runtimes.bench p50 ms | ratio | within 15 % |")
    print("|---|--:|--:|--:|--:|---|")
    found = []
    for model in arguments.models:
        for row in rows(model, arguments.repository, arguments.concurrency, arguments.rounds, arguments.seconds):
            print(line(row), flush=True)
            found.append(row)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\nload {os.getloadavg()[0]:.1f}")
    return 0


def _parser() -> Any:
    result = parser(
        "benchmarks.perf_analyzer.run",
        __doc__.partition(": python")[0] + ".",
        "strategy_encoder --concurrency 1",
        "strategy_encoder --concurrency 1 --concurrency 4 --rounds 13 --seconds 0.3 --json medians.json",
    )
    models_argument(result, "the published models", least=1)
    repository_argument(result)
    result.add_argument("--concurrency", type=int, action="append", required=True,
                        help="requests in flight; repeat for several")  # fmt: skip
    result.add_argument("--rounds", type=int, default=7, help="rounds of each client (default: %(default)s)")
    result.add_argument("--seconds", type=float, default=1.0, help="length of a window (default: %(default)s)")
    result.add_argument("--json", type=Path, help="keep the medians of every round in this file (default: none)")
    hidden_alias(result, "--lanes", "--concurrency")
    return result


if __name__ == "__main__":
    sys.exit(main())

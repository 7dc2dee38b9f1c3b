"""Measure published artifacts beside torch, eager and compiled, taking turns: python -m runtimes.bench"""

import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm import tqdm

from runtimes.artifact import Artifact, write_json
from runtimes.command import command, existing_folder, parser, table
from runtimes.device import gpu
from runtimes.errors import EngineError, InputError
from runtimes.measure import Measurement, Worker, percentile
from runtimes.repository import published
from runtimes.triton_server import TritonServer

SCHEMA = "slipway.bench/1"
PACKAGES = ("numpy", "torch", "onnxruntime", "tensorrt", "tritonclient")
BASELINE = "torch"


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """One line of the table before it is measured: an artifact, and how it is opened."""

    artifact: Artifact
    root: Path
    label: str
    options: Mapping[str, Any] = field(default_factory=dict)


@command
def main(argv: list[str] | None = None) -> int:
    """Measure, print one table, and with --out keep every sample."""
    arguments = _parser().parse_args(argv)
    if arguments.rounds < 1 or not arguments.seconds >= 0:
        raise InputError(
            f"expected 1 or more rounds of 0 or more seconds, found {arguments.rounds}, {arguments.seconds}"
        )
    if arguments.out:
        existing_folder(arguments.out.absolute().parent, "room for the results")
    repository = existing_folder(arguments.repository, "published artifacts")
    options = {"device": arguments.device, "threads": arguments.threads}
    subjects = list(choose(repository, arguments.model, arguments.target, options))
    if not subjects:
        raise InputError(f"expected artifacts that can run here in {repository}, found none; run python -m export.all")
    for model in sorted({subject.artifact.model for subject in subjects if not has_baseline(subject, subjects)}):
        print(
            f"no baseline for {model}; make one: python -m export.all --target torch --model {model}", file=sys.stderr
        )
    with TritonServer(repository) if arguments.triton else nullcontext() as server:
        if server:
            subjects += list(served(subjects, server))
        rows = list(measure(subjects, arguments.seconds, arguments.rounds))
    if arguments.out:
        write_json(arguments.out, {"schema": SCHEMA, "environment": environment(arguments.threads), "rows": rows})
    if arguments.json:
        print(json.dumps({"schema": SCHEMA, "environment": environment(arguments.threads), "rows": rows}))
    else:
        print(row_table(rows))
    return 0


def choose(
    repository: Path, models: Sequence[str], targets: Sequence[str], options: Mapping[str, Any]
) -> Iterator[Subject]:
    """The newest artifact of every model and target that was run where it was made; torch eager and compiled."""
    for root in published(repository):
        artifact = Artifact.load(root)
        wanted = (not models or artifact.model in models) and (not targets or artifact.target in (*targets, BASELINE))
        if not wanted or not artifact.facts.ran:
            continue
        yield Subject(artifact=artifact, root=root, label=artifact.target, options=options)
        if artifact.target == BASELINE:
            yield Subject(artifact=artifact, root=root, label="torch.compile", options={**options, "compiled": True})


def has_baseline(subject: Subject, subjects: Sequence[Subject]) -> bool:
    """Whether torch is measured beside this artifact."""
    return any(other.label == BASELINE and other.artifact.model == subject.artifact.model for other in subjects)


def served(subjects: Sequence[Subject], server: TritonServer) -> Iterator[Subject]:
    """The same artifacts through the server, where it has them."""
    ready = {model["name"] for model in server.index()}
    for subject in subjects:
        if subject.artifact.name in ready:
            options = {"engine": "triton", "url": server.grpc_url}
            yield Subject(artifact=subject.artifact, root=subject.root, label="triton", options=options)


def measure(subjects: Sequence[Subject], seconds: float, rounds: int) -> Iterator[dict[str, Any]]:
    """Rows in the published schema: the engines of one model and size take turns, `rounds` blocks of `seconds` each."""
    groups: dict[str, list[Subject]] = {}
    for subject in subjects:
        groups.setdefault(subject.artifact.model, []).append(subject)
    jobs = [(group, sizes) for group in groups.values() for sizes in sizes_of(group[0].artifact)]
    for group, sizes in (bar := tqdm(jobs, disable=not sys.stderr.isatty(), leave=False)):
        bar.set_description(f"{group[0].artifact.model} {sizes}")
        yield from _measure_group(group, sizes, seconds, rounds)


def sizes_of(artifact: Artifact) -> list[dict[str, int]]:
    """One row of the smallest size (for a policy: one step) and the opt sizes."""
    return [artifact.signature.sizes("min"), artifact.signature.sizes("opt")]


def _measure_group(
    group: Sequence[Subject], sizes: dict[str, int], seconds: float, rounds: int
) -> Iterator[dict[str, Any]]:
    workers: list[Worker | str] = []
    try:
        for subject in group:
            try:
                workers.append(Worker(subject.root, sizes, subject.options))
            except EngineError as error:
                workers.append(str(error))
        for _ in range(rounds):
            for i, worker in enumerate(workers):
                if isinstance(worker, Worker):
                    try:
                        worker.measure_block(seconds)
                    except EngineError as error:
                        workers[i] = str(error)
        for subject, worker in zip(group, workers, strict=True):
            yield row(subject, sizes, worker.measurement if isinstance(worker, Worker) else worker)
    finally:
        for worker in workers:
            if isinstance(worker, Worker):
                worker.close()


def row(subject: Subject, sizes: Mapping[str, int], result: Measurement | str) -> dict[str, Any]:
    """One row of the results file; where the engine could not run, only its reason."""
    artifact = subject.artifact
    head = {
        "model": artifact.model,
        "target": artifact.target,
        "precision": artifact.precision,
        "engine": subject.label,
        "scenario": "single-stream",
        "sizes": dict(sizes),
        "agreement": min((check.value for check in artifact.parity.values() if check.at_least), default=None),
    }
    if isinstance(result, str):
        return {**head, "failed": result}
    samples = result.samples_s
    return {
        **head,
        "provider": result.provider,
        "stable": result.stable,
        "load_s": result.load_s,
        "first_call_s": result.first_call_s,
        **{f"p{p}_s": percentile(samples, p) for p in (50, 90, 95, 99)},
        "rows_per_s": result.rows_per_s,
        "memory_bytes": result.memory_bytes,
        "samples_s": samples,
    }


def row_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as text, each with its median as a multiple of torch eager's speed in the same run."""
    eager = {(r["model"], str(r["sizes"])): r["p50_s"] for r in rows if r["engine"] == BASELINE and "p50_s" in r}
    lines = []
    for r in rows:
        sizes = " ".join(f"{name}={size}" for name, size in r["sizes"].items())
        if "failed" in r:
            lines.append((r["model"], sizes, r["engine"], *["-"] * 10, r["failed"]))
            continue
        base = eager.get((r["model"], str(r["sizes"])))
        times = [_milliseconds(r[f"p{p}_s"]) for p in (50, 90, 95, 99)]
        lines.append(
            (
                *(r["model"], sizes, r["engine"]),
                f"{r['load_s']:.2f}",
                f"{r['first_call_s'] * 1e3:.1f}",
                *times,
                f"{r['rows_per_s']:.0f}",
                f"{r['memory_bytes'] / 1e6:.0f}",
                f"{base / r['p50_s']:.2f}" if base and r["p50_s"] else "-",
                f"{r['agreement']:.3f}" if r["agreement"] is not None else "-",
                "" if r["stable"] else "unstable",
            )
        )
    header = ["model", "sizes", "engine", "load s", "first ms", "p50 ms", "p90 ms", "p95 ms", "p99 ms"]
    return table([*header, "rows/s", "MB", "x eager", "agreement", "note"], lines)


def environment(threads: int) -> dict[str, Any]:
    """What the numbers depend on."""
    found = gpu()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "threads": threads,
        "gpu": f"{found.name} {found.architecture}" if found else None,
        "versions": versions,
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3f}"


def _parser() -> Any:
    result = parser(
        "runtimes.bench",
        __doc__.partition(":")[0] + ".",
        "--model policy_mamba",
        "--model policy_gru --target onnx --triton --out results.json",
    )
    result.add_argument("--model", action="append", default=[], help="one model (default: all that are published)")
    result.add_argument("--target", action="append", default=[], help="one target beside torch (default: all)")
    result.add_argument("--repository", type=Path, default=Path("model_repository"), help="where artifacts are")
    result.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    result.add_argument("--threads", type=int, default=1, help="threads of each engine (default: 1)")
    result.add_argument("--seconds", type=float, default=0.2, help="length of a block (default: 0.2)")
    result.add_argument("--rounds", type=int, default=10, help="blocks for each engine (default: 10)")
    result.add_argument("--triton", action="store_true", help="also measure through a Triton started for it")
    result.add_argument("--out", type=Path, help="write the results, with every sample, to this file")
    result.add_argument("--json", action="store_true", help="print JSON only")
    return result


if __name__ == "__main__":
    sys.exit(main())

"""Publish the plain encoder as optimum-onnx exports it, for comparison: python -m benchmarks.peers_cpu.optimum_encoder

    make peer-optimum
    python -m runtimes.bench strategy_encoder

The export of optimum is verified against the checkpoint in its own environment, with the parity checks of every
artifact. It is published in a folder that no Triton serves.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from export import parity
from export.source import Source
from export.triton.repository import drafting, publish
from runtimes.artifact import Artifact, Facts, digests, sha256_json
from runtimes.bench.measure import CHECKOUT, interpreter
from runtimes.engines.optimum import MODEL_FOLDER
from runtimes.errors import EngineError
from runtimes.host.cli import command, parser, repository_argument
from runtimes.runtime import Runtime
from runtimes.tensors import Tensors
from training.checkpoint import Checkpoint
from training.spec import find_spec

MODEL = "strategy_encoder"
EXPORT = """
import sys
from optimum.onnxruntime import ORTModelForFeatureExtraction
ORTModelForFeatureExtraction.from_pretrained(sys.argv[1], export=True).save_pretrained(sys.argv[2])
"""
ANSWER = """
import sys
import numpy as np
from runtimes.runtime import open_runtime
with open_runtime(sys.argv[1]) as runtime:
    for path in map(str.strip, sys.stdin):
        np.savez(path, **runtime.run(dict(np.load(path))))
        print("ok", flush=True)
"""
VERSIONS = "from importlib.metadata import version as v; print(*(f'{p} {v(p)}' for p in %r), sep='\\n')"
PACKAGES = ("optimum", "optimum-onnx", "onnxruntime", "transformers", "torch")


class RightPadded(Source):
    """The original, with inputs that are padded at the end only, as by a tokenizer.

    Hugging Face's own encoders count positions differently where padding is between tokens.
    """

    def draw_inputs(self, rng: np.random.Generator, sizes: Mapping[str, int]) -> Tensors:
        return {name: right_padded(ids, self.pad) for name, ids in super().draw_inputs(rng, sizes).items()}

    @property
    def pad(self) -> int:
        return int(self.module.model.config.pad_token_id)


def right_padded(ids: np.ndarray, pad: int) -> np.ndarray:
    """The same tokens in each row, followed by the padding."""
    return np.take_along_axis(ids, np.argsort(ids == pad, axis=1, kind="stable"), axis=1)


class OtherEnvironment(Runtime):
    """Runs an artifact in the environment of its engine, one process for all calls."""

    engine = "other environment"
    provider = "another environment"

    def open(self) -> None:
        self.scratch = Path(tempfile.mkdtemp(prefix="slipway-peer-")) / "tensors.npz"
        self.process = subprocess.Popen(
            [interpreter(self.artifact.runtime), "-c", ANSWER, self.root],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT,
        )  # fmt: skip

    def infer(self, inputs: Mapping[str, np.ndarray]) -> Tensors:
        np.savez(self.scratch, **inputs)  # type: ignore[arg-type]
        print(self.scratch, file=self.process.stdin, flush=True)
        if not self.process.stdout.readline():
            raise EngineError(f"expected an answer of {self.artifact.runtime}, found none; its output is above")
        return dict(np.load(self.scratch))

    def close(self) -> None:
        self.process.communicate()
        self.scratch.unlink(missing_ok=True)
        self.scratch.parent.rmdir()


@contextmanager
def plain_encoder(source: Source) -> Iterator[Path]:
    """A folder with the encoder of the checkpoint as Hugging Face stores one."""
    with tempfile.TemporaryDirectory(prefix="slipway-peer-") as folder:
        source.module.model.save_pretrained(folder)
        yield Path(folder)


def make(source: Source, repository: Path) -> Path:
    """The published artifact: exported by optimum, verified against the checkpoint."""
    python = interpreter("optimum")
    found = subprocess.run([python, "-c", VERSIONS % (PACKAGES,)], capture_output=True, text=True, check=True).stdout
    with drafting(repository) as draft:
        with plain_encoder(source) as encoder:
            subprocess.run([python, "-c", EXPORT, encoder, draft / MODEL_FOLDER], check=True, stdout=sys.stderr)
        for path in source.checkpoint.assets.iterdir():
            (draft / "assets").mkdir(exist_ok=True)
            (draft / "assets" / path.name).write_bytes(path.read_bytes())
        artifact = described(source, draft, dict(line.split() for line in found.splitlines()))
        artifact.save(draft)
        with OtherEnvironment(draft, artifact) as candidate:
            checks = parity.check_parity(candidate, source, "fp32")
        parity.require_passed(checks)
        verified = Facts(built=True, deserialized=True, ran=True, compared=True)
        artifact = replace(artifact, parity=checks, facts=verified)
        artifact.save(draft)
        return publish(draft, artifact, repository, served=False)


def described(source: Source, draft: Path, versions: dict[str, str]) -> Artifact:
    files = digests(draft)
    return Artifact(
        model=MODEL,
        target="optimum",
        runtime="optimum",
        precision="fp32",
        pipeline=MODEL,
        config=dict(source.config),
        signature=source.signature,
        files=files,
        built_with=versions,
        checkpoint=source.checkpoint.digest,
        key=sha256_json({"files": files, "versions": versions}),
        facts=Facts(built=True, deserialized=False, ran=False, compared=False),
    )


@command
def main(argv: list[str] | None = None) -> int:
    """Print the folder of the artifact."""
    arguments = _parser().parse_args(argv)
    print(make(RightPadded(find_spec(MODEL), Checkpoint.load(arguments.checkpoint)), arguments.repository))
    return 0


def _parser() -> Any:
    result = parser(
        "benchmarks.peers_cpu.optimum_encoder",
        __doc__.partition(": python")[0] + ".",
        "",
        "--checkpoint checkpoints/strategy",
    )
    result.add_argument("--checkpoint", type=Path, default=Path("checkpoints/strategy"),
                        help="folder of the checkpoint (default: %(default)s)")  # fmt: skip
    repository_argument(result)
    return result


if __name__ == "__main__":
    sys.exit(main())

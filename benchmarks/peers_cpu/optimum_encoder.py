"""The plain encoder as optimum-onnx exports it, as an artifact beside ours: a row of every later benchmark of it.

    make peer-optimum
    python -m runtimes.bench --model strategy_encoder

What optimum wrote is proved against the checkpoint in its own environment, as ours is. It is published where no Triton
serves it.
"""

import argparse
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
from runtimes.errors import EngineError, SlipwayError
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
    """The original, asked with padding at the end alone, as a tokenizer makes it.

    Positions are counted otherwise by Hugging Face's own encoders where padding stands between tokens.
    """

    def draw_inputs(self, rng: np.random.Generator, sizes: Mapping[str, int]) -> Tensors:
        return {name: right_padded(ids, self.pad) for name, ids in super().draw_inputs(rng, sizes).items()}

    @property
    def pad(self) -> int:
        return int(self.module.model.config.pad_token_id)


def right_padded(ids: np.ndarray, pad: int) -> np.ndarray:
    """The same tokens in each row, with the padding behind them."""
    return np.take_along_axis(ids, np.argsort(ids == pad, axis=1, kind="stable"), axis=1)


class Elsewhere(Runtime):
    """Runs an artifact in the environment of its engine, one process for all calls."""

    engine = "elsewhere"
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
            raise EngineError(f"expected an answer of {self.artifact.runtime}, found none; its words are above")
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
    """The published artifact: exported by optimum, proved against the checkpoint."""
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
        with Elsewhere(draft, artifact) as candidate:
            checks = parity.check_parity(candidate, source, "fp32")
        parity.require_passed(checks)
        proved = Facts(built=True, deserialized=True, ran=True, compared=True)
        artifact = replace(artifact, parity=checks, facts=proved)
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/strategy"))
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    given: Any = parser.parse_args()
    try:
        source = RightPadded(find_spec(MODEL), Checkpoint.load(given.checkpoint))
        print(make(source, given.repository))
    except SlipwayError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())

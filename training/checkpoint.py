"""Checkpoints with the trained parameters and the digests of the frozen ones. Safetensors only; no pickle is read."""

import importlib.metadata
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file, save_file

from runtimes.artifact import (
    ASSETS,
    digests,
    not_a_manifest,
    read_manifest,
    sha256_json,
    verify_digests,
    write_manifest,
)
from runtimes.errors import ArtifactError
from runtimes.tensors import Tensors
from training.config import Config, Metrics
from training.digests import array, sha256_tensor
from training.spec import Frozen, ModelSpec

if TYPE_CHECKING:
    from torch import nn

MANIFEST = "checkpoint.json"
WEIGHTS = "weights.safetensors"
SAMPLE_INPUTS = "sample_inputs.safetensors"
SAMPLE_INPUTS_BEFORE_0_2 = "probe.safetensors"
FORMAT = "slipway.checkpoint/1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """The manifest of a trained model in `folder`. It ends with its own sha256, so that every edit is detected.

    `files` gives sha256 by relative path. `frozen` gives, by prefix, the source, its revision and sha256 by tensor.
    """

    folder: Path
    model: str
    preset: str
    config: Config
    training: Config
    step: int
    metrics: Metrics
    files: Mapping[str, str]
    frozen: Mapping[str, Any]
    trained_with: Mapping[str, str]

    @property
    def digest(self) -> str:
        """A digest of everything in the checkpoint that a conversion depends on."""
        return sha256_json([self.model, self.config, dict(self.files), dict(self.frozen)])

    @classmethod
    def load(cls, folder: Path) -> "Checkpoint":
        """The checkpoint in `folder` with every file verified; `ArtifactError` if one changed or is missing."""
        if not folder.exists() and _old(folder).is_dir():  # the process was killed between the two renames of _swap
            folder = _old(folder)
        path = folder / MANIFEST
        data = read_manifest(path, FORMAT, "train the model again")
        try:
            checkpoint = cls(folder=folder, **data)
        except TypeError as error:
            raise not_a_manifest(path, error, "train the model again") from error
        verify_digests(folder, checkpoint.files)
        return checkpoint

    def sample_inputs(self) -> Tensors:
        """Real inputs of the model, chosen by the recipe."""
        path = self.folder / SAMPLE_INPUTS
        return load_file(path if path.is_file() else self.folder / SAMPLE_INPUTS_BEFORE_0_2)

    @property
    def assets(self) -> Path:
        """Files the pipeline needs, such as a tokenizer; the folder may be missing."""
        return self.folder / ASSETS


def exists(folder: Path) -> bool:
    """Whether `Checkpoint.load` finds a folder, complete or not."""
    return folder.is_dir() or _old(folder).is_dir()


def save_checkpoint(
    folder: Path,
    spec: ModelSpec,
    module: "nn.Module",
    *,
    preset: str,
    config: Config,
    training: Config,
    step: int,
    metrics: Metrics,
    sample_inputs: Tensors,
) -> Checkpoint:
    """Write trained parameters, sample inputs, assets and manifest; the folder is complete or untouched."""
    frozen = spec.interface.frozen(config)
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for name, data in spec.interface.assets(config).items():
        (draft / ASSETS).mkdir(exist_ok=True)
        (draft / ASSETS / name).write_bytes(data)
    tensors = {name: array(tensor) for name, tensor in module.state_dict().items()}
    save_file({name: tensor for name, tensor in tensors.items() if not _under(name, frozen)}, draft / WEIGHTS)
    save_file({name: np.ascontiguousarray(values) for name, values in sample_inputs.items()}, draft / SAMPLE_INPUTS)
    manifest = {
        "model": spec.name,
        "preset": preset,
        "config": config,
        "training": training,
        "step": step,
        "metrics": metrics,
        "files": digests(draft),
        "frozen": {part.prefix: describe_frozen(part, tensors) for part in frozen},
        "trained_with": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }
    write_manifest(draft / MANIFEST, FORMAT, manifest)
    _swap(draft, folder)
    return Checkpoint.load(folder)


def restore(checkpoint: Checkpoint, spec: ModelSpec) -> "nn.Module":
    """The module of a checkpoint, or the part of it that `spec` is, in eval mode.

    `ArtifactError` if it is another model's checkpoint, if a parameter is missing, extra or of another shape, or if
    a frozen part is not the one it was trained over.
    """
    import torch

    if checkpoint.model != spec.checkpoint:
        raise ArtifactError(
            f"{checkpoint.folder}: expected a checkpoint of {spec.checkpoint}, found one of {checkpoint.model}"
        )
    module = spec.interface.build(checkpoint.config).eval()
    frozen = spec.interface.frozen(checkpoint.config)
    own = {name: array(tensor) for name, tensor in module.state_dict().items()}
    _refuse_another_base(checkpoint, frozen, own)
    stored = load_file(checkpoint.folder / WEIGHTS)
    expected = {name: tensor.shape for name, tensor in own.items() if not _under(name, frozen)}
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    if expected != shapes:
        wrong = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
        name = wrong[0]
        raise ArtifactError(
            f"{checkpoint.folder / WEIGHTS}: {len(wrong)} parameters do not fit, first '{name}': "
            f"expected {expected.get(name, 'none')}, found {shapes.get(name, 'none')}"
        )
    module.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in stored.items()}, strict=False)
    return spec.interface.part(module)


def describe_frozen(part: Frozen, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Source, revision and the digest of every tensor of a frozen part."""
    own = {name: tensor for name, tensor in tensors.items() if _under(name, (part,))}
    return {**asdict(part), "tensors": {name: sha256_tensor(tensor) for name, tensor in sorted(own.items())}}


def _refuse_another_base(checkpoint: Checkpoint, frozen: Iterable[Frozen], own: Mapping[str, np.ndarray]) -> None:
    for part in frozen:
        expected = checkpoint.frozen.get(part.prefix, {}).get("tensors", {})
        found = describe_frozen(part, own)["tensors"]
        if expected != found:
            wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            raise ArtifactError(
                f"{checkpoint.folder}: expected '{part.prefix}' from {part.source} that it was trained with, found "
                f"another: {len(wrong)} tensors differ, first '{wrong[0]}'; give the base of revision {part.revision}"
            )


def _under(name: str, frozen: Iterable[Frozen]) -> bool:
    return any(name.startswith(part.prefix + ".") for part in frozen)


def _old(folder: Path) -> Path:
    """The place of the old checkpoint while a new one is moved to `folder`."""
    return folder.with_name(f".{folder.name}.old")


def _swap(draft: Path, folder: Path) -> None:
    """Move `draft` to `folder`; the old checkpoint is removed after the new one is in its place."""
    old = _old(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)

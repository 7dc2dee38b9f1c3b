"""The choice of the artifact that a model's ensemble goes through."""

from contextlib import suppress
from pathlib import Path

from export.target import Target
from export.triton.backend import find_backend
from runtimes import plugins
from runtimes.artifact import Artifact
from runtimes.errors import SlipwayError
from runtimes.repository import artifacts_root, published


def is_ensemble_target(artifact: Artifact, repository: Path) -> bool:
    """Whether the model's ensemble goes through this artifact: that of the target with the lowest ensemble rank.

    Targets of equal rank are ordered by name. Only the default precision of a target counts, only artifacts of the same
    checkpoint, and only those whose backend takes tensors. A damaged artifact, or one of an earlier format, does not.
    """
    targets = _targets()
    candidates = [
        each.target
        for each in (artifact, *_served(repository))
        if (each.model, each.checkpoint) == (artifact.model, artifact.checkpoint)
        and takes_tensors(each)
        and each.target in targets
        and each.precision == targets[each.target].precisions[0]
    ]
    best = min(candidates, key=lambda name: (targets[name].ensemble_rank, name), default=None)
    return artifact.target == best and artifact.precision == targets[best].precisions[0]


def takes_tensors(artifact: Artifact) -> bool:
    """Whether Triton serves the artifact with the tensors of its signature."""
    backend = find_backend(artifact.runtime)
    return backend is not None and backend.takes_tensors


def _targets() -> dict[str, Target]:
    names = plugins.names("export.targets")
    return {name: plugins.load("export.targets", name, "TARGET") for name in names}


def _served(repository: Path) -> list[Artifact]:
    """The newest version of every served artifact that can be read."""
    found = []
    for folder in published(repository):
        if folder.is_relative_to(artifacts_root(repository, True)):
            with suppress(SlipwayError):
                found.append(Artifact.load(folder))
    return found

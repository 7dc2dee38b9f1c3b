"""Compares what a Triton server is to load with its manifests, for NVIDIA's own backends look at no digest."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from runtimes.artifact import MANIFEST, Artifact, verify_digests
from runtimes.errors import ArtifactError, SlipwayError, one_line
from runtimes.repository import REQUEST_SCHEMA, STEP_FILE, versions

CONFIG = "config.pbtxt"


class VersionWatch:
    """The models of a repository, each as its newest version, which is the one that Triton serves.

    `problems` says of a model what does not fit its manifest; nothing is read for that unless it is to `compare`.
    """

    def __init__(self, repository: Path, compare: bool = True) -> None:
        self.repository = repository
        self.compare = compare
        self.known: dict[str, tuple[Path, int]] = {}
        self.problems: dict[str, str] = {}

    def look(self) -> list[str]:
        """The models that are new, changed or gone since the last call, gone being those that are not `known`."""
        before, self.known = self.known, dict(self._newest())
        changed = [model for model in sorted({*before, *self.known}) if before.get(model) != self.known.get(model)]
        for model in changed:
            self.problems.pop(model, None)
            if self.compare and model in self.known and (problem := problem_of(self.known[model][0])):
                self.problems[model] = problem
        return changed

    def holds_back(self, model: str) -> bool:
        """Whether a model has to wait until another fits: a step for its artifact, an ensemble for all its parts."""
        version, _ = self.known[model]
        return bool(self.problems) and (is_ensemble(version) or Artifact.load(version).name in self.problems)

    def _newest(self) -> Iterator[tuple[str, tuple[Path, int]]]:
        """The newest version of each model, and the newest time of its files and its config, by which Triton goes."""
        for model in self.repository.iterdir():
            with suppress(FileNotFoundError):  # it was replaced meanwhile
                for version in versions(model)[-1:]:
                    files = (model / CONFIG, version, *version.rglob("*"))
                    yield model.name, (version, max(path.stat().st_mtime_ns for path in files))


def is_ensemble(version: Path) -> bool:
    """Whether there is nothing in a version to be compared: an ensemble is a config and the schema of a request."""
    return {path.name for path in version.iterdir()} <= {REQUEST_SCHEMA}


def problem_of(version: Path) -> str:
    """What does not fit the manifest of a version folder, in one line, or nothing."""
    try:
        verify(version)
    except SlipwayError as error:
        return str(error)
    except OSError as error:
        return f"{version}: expected files that can be read, found {one_line(error)}"
    return ""


def verify(version: Path) -> None:
    """`ArtifactError` unless the files in a version folder are those of its manifest.

    The steps of an ensemble have the manifest of a whole artifact, and of its files what they read.
    """
    if is_ensemble(version):
        return
    if not (version / MANIFEST).is_file():
        raise ArtifactError(f"{version}: expected {MANIFEST}, found none; publish the model again")
    artifact = Artifact.load(version)
    whole = not (version / STEP_FILE).is_file()
    files = {name: digest for name, digest in artifact.files.items() if whole or (version / name).exists()}
    verify_digests(version, {**files, **artifact.assets})

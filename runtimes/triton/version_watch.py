"""Compares what a Triton server is to load with its manifests, for NVIDIA's own backends look at no digest."""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from runtimes.artifact import MANIFEST, Artifact, verify_digests
from runtimes.errors import ArtifactError, SlipwayError, one_line
from runtimes.repository import REQUEST_SCHEMA, STEP_FILE, versions

CONFIG = "config.pbtxt"
LATEST = re.compile(r"\bnum_versions\s*:\s*(\d+)")

Seen = tuple[tuple[Path, ...], int]  # the versions that are loaded, and the newest time of their files and the config


class VersionWatch:
    """The models of a repository, each in the versions that Triton loads.

    `problems` says of a model what does not fit its manifest; nothing is read for that unless it is to `compare`.
    """

    def __init__(self, repository: Path, compare: bool = True) -> None:
        self.repository = repository
        self.compare = compare
        self.known: dict[str, Seen] = {}
        self.problems: dict[str, str] = {}

    def look(self) -> list[str]:
        """The models that are new, changed or gone since the last call, gone being those that are not `known`."""
        before, self.known = self.known, dict(self._loaded())
        changed = [model for model in sorted({*before, *self.known}) if before.get(model) != self.known.get(model)]
        for model in changed:
            self.problems.pop(model, None)
            found = map(problem_of, self.known[model][0]) if self.compare and model in self.known else ()
            if problem := next(filter(None, found), ""):
                self.problems[model] = problem
        return changed

    def holds_back(self, model: str) -> bool:
        """Whether a model has to wait until another fits: a step for its artifact, an ensemble for all its parts."""
        newest = self.known[model][0][-1]
        return bool(self.problems) and (is_ensemble(newest) or Artifact.load(newest).name in self.problems)

    def _loaded(self) -> Iterator[tuple[str, Seen]]:
        """What Triton loads of each model: as many of the newest versions as its config says."""
        for model in self.repository.iterdir():
            with suppress(FileNotFoundError, NotADirectoryError):  # it was replaced meanwhile, or is no model
                latest = LATEST.search((model / CONFIG).read_text("utf-8", "replace"))
                if loaded := versions(model)[-int(latest[1]) if latest else 0 :]:
                    files = (model / CONFIG, *(path for version in loaded for path in (version, *version.rglob("*"))))
                    yield model.name, (tuple(loaded), max(path.stat().st_mtime_ns for path in files))


def is_ensemble(version: Path) -> bool:
    """Whether there is nothing in a version to be compared: an ensemble is a config and the schema of a request."""
    return {path.name for path in version.iterdir()} <= {REQUEST_SCHEMA}


def problem_of(version: Path) -> str:
    """What does not fit the manifest of a version folder, in one line, or nothing."""
    try:
        verify(version)
    except SlipwayError as error:
        return f"{error}, and take {version} away"  # a newer one alone would not do: Triton loads the one before, too
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

"""Comparison of the models that a Triton server will load with their manifests: NVIDIA's backends check no digest."""

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

    `problems` has, by model, the fault by which it does not match its manifest; no file is read unless `compare`.
    """

    def __init__(self, repository: Path, compare: bool = True) -> None:
        self.repository = repository
        self.compare = compare
        self.known: dict[str, Seen] = {}
        self.problems: dict[str, str] = {}

    def look(self) -> list[str]:
        """The models that are new, changed or removed since the last call; removed ones are not `known`."""
        before, self.known = self.known, dict(self._loaded())
        changed = [model for model in sorted({*before, *self.known}) if before.get(model) != self.known.get(model)]
        for model in changed:
            self.problems.pop(model, None)
            found = map(problem_of, self.known[model][0]) if self.compare and model in self.known else ()
            if problem := next(filter(None, found), ""):
                self.problems[model] = problem
        return changed

    def holds_back(self, model: str) -> bool:
        """Whether a model waits until another is valid: a step for its artifact, an ensemble for all its parts."""
        newest = self.known[model][0][-1]
        return bool(self.problems) and (is_ensemble(newest) or Artifact.load(newest).name in self.problems)

    def _loaded(self) -> Iterator[tuple[str, Seen]]:
        """The versions that Triton loads of each model: as many of the newest as its config names."""
        for model in self.repository.iterdir():
            with suppress(FileNotFoundError, NotADirectoryError):  # it was just replaced, or is no model
                latest = LATEST.search((model / CONFIG).read_text("utf-8", "replace"))
                if loaded := versions(model)[-int(latest[1]) if latest else 0 :]:
                    files = (model / CONFIG, *(path for version in loaded for path in (version, *version.rglob("*"))))
                    yield model.name, (tuple(loaded), max(path.stat().st_mtime_ns for path in files))


def is_ensemble(version: Path) -> bool:
    """Whether a version has no file to compare: an ensemble is a config and the schema of a request."""
    return {path.name for path in version.iterdir()} <= {REQUEST_SCHEMA}


def problem_of(version: Path) -> str:
    """The fault by which a version folder does not match its manifest, in one line, or an empty text."""
    try:
        verify(version)
    except SlipwayError as error:
        return f"{error}, and take {version} away"  # a newer one alone would not do: Triton also loads the one before
    except OSError as error:
        return f"{version}: expected files that can be read, found {one_line(error)}"
    return ""


def verify(version: Path) -> None:
    """`ArtifactError` unless the files in a version folder are those of its manifest.

    The steps of an ensemble have the manifest of a whole artifact, but only those of its files that they read.
    """
    if is_ensemble(version):
        return
    if not (version / MANIFEST).is_file():
        raise ArtifactError(f"{version}: expected {MANIFEST}, found none; publish the model again")
    artifact = Artifact.load(version)
    whole = not (version / STEP_FILE).is_file()
    files = {name: digest for name, digest in artifact.files.items() if whole or (version / name).exists()}
    verify_digests(version, {**files, **artifact.assets})

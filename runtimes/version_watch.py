"""Compares what a Triton server is about to serve with its manifests: NVIDIA's own backends look at no digest."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from runtimes.artifact import MANIFEST, Artifact, verify_digests
from runtimes.errors import ArtifactError, SlipwayError, one_line
from runtimes.repository import REQUEST_SCHEMA, STEP_FILE, versions


class VersionWatch:
    """The newest version of every model in a repository: the one that Triton serves."""

    def __init__(self, repository: Path) -> None:
        self.repository = repository
        self.known: dict[Path, int] = {}

    def problems(self) -> Iterator[str]:
        """What does not fit among the versions that are new, or whose files are, since the last call."""
        for version in self._changed():
            try:
                verify(version)
            except SlipwayError as error:
                yield str(error)
            except OSError as error:
                yield f"{version}: expected files that can be read, found {one_line(error)}"

    def _changed(self) -> list[Path]:
        """Versions by the same sign that has Triton load them: the newest time of a file."""
        before, self.known = self.known, {}
        for model in sorted(self.repository.iterdir()):
            with suppress(FileNotFoundError):  # it was replaced meanwhile
                for version in versions(model)[-1:]:
                    self.known[version] = max(path.stat().st_mtime_ns for path in (version, *version.rglob("*")))
        return [version for version, changed_ns in self.known.items() if before.get(version) != changed_ns]


def verify(version: Path) -> None:
    """`ArtifactError` unless the files in a version folder are those of its manifest.

    The steps of an ensemble have the manifest of a whole artifact, and of its files what they read; the ensemble itself
    has nothing but the schema of a request.
    """
    if not (version / MANIFEST).is_file():
        for path in version.iterdir():
            if path.name != REQUEST_SCHEMA:
                raise ArtifactError(f"{version}: expected {MANIFEST} beside {path.name}, found none; publish it anew")
        return
    artifact = Artifact.load(version)
    whole = not (version / STEP_FILE).is_file()
    files = {name: digest for name, digest in artifact.files.items() if whole or (version / name).exists()}
    verify_digests(version, {**files, **artifact.assets})

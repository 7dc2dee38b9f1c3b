"""Reload of a model whose Python stub died: Triton fails every further request to it (server#8604)."""

import os
from collections.abc import Iterator
from pathlib import Path

from runtimes.errors import EngineError, one_line

STUB = "triton_python_backend_stub"


class StubWatch:
    """The stubs of the server whose shared memory has this prefix; call `revive` about every second."""

    def __init__(self, shared_memory_prefix: str) -> None:
        self.prefix = shared_memory_prefix
        self.known: dict[int, Path] = {}

    def revive(self) -> list[str]:
        """The models whose stub died since the last call; a watch of changed models then loads them again.

        Their version folders get a newer time. A newer config alone would not do: where its content is the same, Triton
        keeps the instance it has. `EngineError` if the repository may not be written to.
        """
        alive = dict(stubs(self.prefix))
        # A stub that Triton ended itself is gone; one that died stays a zombie, for Triton does not wait for it.
        ended = {version for stub, version in self.known.items() if stub not in alive and is_zombie(stub)}
        dead = {version for version in ended if version.is_dir()}  # one that ends normally may be a zombie for a moment
        self.known = alive
        for version in dead:
            try:
                os.utime(version)
            except OSError as error:
                raise EngineError(
                    f"the Python stub of {version.parent.name} died and cannot be replaced in a repository that may "
                    f"not be written to ({one_line(error)}); start the server again"
                ) from error
        return sorted(version.parent.name for version in dead)


def stubs(shared_memory_prefix: str) -> Iterator[tuple[int, Path]]:
    """Every stub of the server: its process, and the version folder of its model."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has just ended
            continue
        if line[0].endswith(STUB) and any(shared_memory_prefix in argument for argument in line[2:]):
            yield int(folder.name), Path(line[1]).parent  # REPOSITORY/MODEL/VERSION/FILE


def is_zombie(process: int) -> bool:
    """Whether a process has ended and its parent has not read its status."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False

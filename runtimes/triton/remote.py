"""RemoteModel: the common part of the engines whose model is served by Triton."""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from runtimes.artifact import Artifact
from runtimes.errors import EngineError, InputError
from runtimes.runtime import Runtime
from runtimes.triton.client import CLIENTS, TritonClient

DEFAULT_URLS = {"grpc": "127.0.0.1:8001", "http": "127.0.0.1:8000"}


class RemoteModel(Runtime):
    """The model `model` on the server at `url` ("host:port"); by default the artifact's own name on this machine.

    An engine writes `check_metadata`, and `infer` with the open `client`.
    """

    remote = True
    protocols: ClassVar[tuple[str, ...]] = tuple(CLIENTS)

    def __init__(
        self,
        root: Path,
        artifact: Artifact,
        *,
        url: str | None = None,
        protocol: str = "grpc",
        model: str | None = None,
        timeout_s: float = 60.0,
        **options: Any,
    ) -> None:
        super().__init__(root, artifact, **options)
        if protocol not in self.protocols:
            raise InputError(f"expected a protocol of {', '.join(self.protocols)}; found '{protocol}'")
        self.url = url or DEFAULT_URLS[protocol]
        self.protocol = protocol
        self.model = model or artifact.name
        self.timeout_s = timeout_s
        self._client: TritonClient | None = None
        self._provider = "not open"

    @abstractmethod
    def check_metadata(self, metadata: Mapping[str, Any]) -> None:
        """`EngineError` unless the served model has the inputs and outputs that this engine sends and reads."""

    def open(self) -> None:
        self._client = CLIENTS[self.protocol](self.url, self.timeout_s)
        metadata = self._client.metadata(self.model)
        self.check_metadata(metadata)
        self._provider = f"triton {self._client.server_version()} {metadata['platform']}"

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
        self._client = None

    @property
    def client(self) -> TritonClient:
        """The open connection; `EngineError` outside of the with block."""
        if self._client is None:
            raise EngineError(f"{self.model}: expected an open runtime, found a closed one; enter it first")
        return self._client

    @property
    def provider(self) -> str:
        return self._provider

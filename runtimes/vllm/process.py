"""A model that vLLM serves from a process of its own, which is started again when it has died."""

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from runtimes.errors import EngineError
from runtimes.host.background_server import answers
from runtimes.vllm.client import Completion, Prompt, VllmClient
from runtimes.vllm.server import Reported, VllmServer

TAIL_LINES = 3
HEALTH_TIMEOUT_S = 10.0  # a busy server is not a dead one, which refuses the connection at once


class VllmModel:
    """Answers requests from any number of threads with the server that `open` started.

    A request under which the server dies is an `EngineError` with the end of its log; the next one starts it again.
    """

    def __init__(self, arguments: Mapping[str, Any], *, timeout_s: float = 600.0, **options: Any) -> None:
        self.arguments = arguments
        self.timeout_s = timeout_s
        self.options = options  # of the server
        self._changing = threading.Lock()
        self._server: VllmServer | None = None
        self._closed = True

    def open(self) -> Reported:
        """Start the server; the configuration that it reports."""
        self._closed = False
        return self._serving().reported()

    def close(self) -> None:
        """Stop the server. Closing twice is allowed."""
        with self._changing:
            self._closed = True
            if self._server:
                self._server.close()
            self._server = None

    def complete(self, prompts: Sequence[Prompt], **sampling: Any) -> list[Completion]:
        """See `VllmClient.complete`."""
        with self._client() as client:
            return client.complete(prompts, **sampling)

    def stream(self, prompt: Prompt, **sampling: Any) -> Iterator[Completion]:
        """See `VllmClient.stream`."""
        with self._client() as client:
            yield from client.stream(prompt, **sampling)

    def score(self, prompts: Sequence[Sequence[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """See `VllmClient.score`."""
        with self._client() as client:
            return client.score(prompts)

    def embed(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """See `VllmClient.embed`."""
        with self._client() as client:
            return client.embed(prompts)

    def metrics(self) -> dict[str, float]:
        """See `VllmClient.metrics`."""
        with self._client() as client:
            return client.metrics()

    @property
    def pid(self) -> int:
        """The process above all of the server's."""
        return self._serving().pid

    def _serving(self) -> VllmServer:
        """The server, started anew if it has died."""
        with self._changing:
            if self._closed:
                raise EngineError(
                    f"{self.arguments['model']}: expected an open model, found a closed one; open it first"
                )
            if self._server is not None and not self._server.running:
                self._server.close()
                self._server = None
            if self._server is None:
                self._server = VllmServer(self.arguments, **self.options).__enter__()
            return self._server

    @contextlib.contextmanager
    def _client(self) -> Iterator[VllmClient]:
        server = self._serving()
        try:
            yield VllmClient(server.url, self.timeout_s)
        except EngineError as error:
            if answers(server.url, "/health", HEALTH_TIMEOUT_S):
                raise
            raise self._died(server, error) from error

    def _died(self, server: VllmServer, error: EngineError) -> EngineError:
        """The error for a request whose server is gone; the rest of that server is removed."""
        tail = " | ".join(server.log_tail(TAIL_LINES).splitlines())
        with self._changing:
            server.close()
            if self._server is server:
                self._server = None
        return EngineError(f"vLLM died under the request ({error}); the next one starts it again; its log ends: {tail}")

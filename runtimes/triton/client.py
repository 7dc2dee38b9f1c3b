"""One client for both protocols of a Triton server: tensors by name in, tensors by name out, one-line errors."""

import queue
import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from runtimes.errors import EngineError, InputError, Overloaded, one_line, require
from runtimes.tensors import Tensors

BUSY = ("maximum queue size", "timeout expired")  # in messages of Triton's batcher
REFUSED = ("400", "StatusCode.INVALID_ARGUMENT")
UNREACHABLE = ("StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED")
ANY_LENGTH = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]

Answer = Callable[[], Tensors]


class TritonClient(ABC):
    """A connection to the server at `url` ("host:port"), opened by the first call.

    Every call raises `InputError` if the server refuses it, `Overloaded` if its queue is full, `EngineError` if
    it fails or takes longer than `timeout_s`.
    """

    protocol: str

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url = url
        self.timeout_s = timeout_s
        self.library = require(f"tritonclient.{self.protocol}", extra="client")
        self.utils = require("tritonclient.utils", extra="client")
        self.client: Any = self._connect()

    @abstractmethod
    def _connect(self) -> Any:
        """The connection that `close` closes."""

    @abstractmethod
    def _server_metadata(self) -> dict[str, Any]:
        """The server's name, version and extensions."""

    @abstractmethod
    def _model_metadata(self, model: str) -> dict[str, Any]:
        """The result of `metadata`."""

    @abstractmethod
    def _request(self, model: str, inputs: Mapping[str, np.ndarray], sequence: Mapping[str, Any]) -> Any:
        """A request, which may be sent more than once."""

    @abstractmethod
    def _submit(self, request: Any) -> "Future[Any]":
        """The future answer to a request that is sent now."""

    @abstractmethod
    def _infer(self, request: Any) -> Any:
        """The answer to a request that this thread sends and waits for."""

    @abstractmethod
    def _result(self, answered: Any) -> Any:
        """The library's result, which has `as_numpy`, of an answer."""

    def server_version(self) -> str:
        with self._translated():
            return str(self._server_metadata()["version"])

    def metadata(self, model: str) -> dict[str, Any]:
        """The server's metadata of a model: versions, platform, inputs, outputs."""
        with self._translated():
            return self._model_metadata(model)

    def send(
        self,
        model: str,
        inputs: Mapping[str, np.ndarray],
        outputs: Iterable[str],
        *,
        alone: bool = False,
        **sequence: Any,
    ) -> Answer:
        """A call that waits for the outputs of a request that is sent now.

        One that is `alone` is sent by that call, in its thread: without the library's threads between, it takes a third
        less. Called again, it sends the same request again. `sequence` are its sequence_id, sequence_start and
        sequence_end.
        """
        request = self._request(model, inputs, sequence)
        if alone:
            return self._answer(partial(self._infer, request), outputs)
        with self._translated():
            return self._answer(self._submit(request).result, outputs)

    def post(
        self,
        model: str,
        inputs: Mapping[str, np.ndarray],
        outputs: Iterable[str],
        then: Callable[[Answer], object],
        **sequence: Any,
    ) -> None:
        """Send a request; once it is answered, `then` gets the call for its outputs, in a thread of the library."""
        with self._translated():
            future = self._submit(self._request(model, inputs, sequence))
        future.add_done_callback(lambda done: then(self._answer(done.result, outputs)))

    def _answer(self, wait: Callable[[], Any], outputs: Iterable[str]) -> Answer:
        def answer() -> Tensors:
            with self._translated():
                result = self._result(wait())
                return {name: result.as_numpy(name) for name in outputs}

        return answer

    def stream(self, model: str, inputs: Mapping[str, np.ndarray], **sequence: Any) -> Iterator[Tensors]:
        """The responses of a decoupled model to one request, as they arrive; `timeout_s` bounds the wait for each.

        An iterator that is closed, or dropped, cancels the remaining responses. Every error is an `EngineError`, and
        `Overloaded` by its text, for it arrives without a status: Triton 2.51 would send one for the
        header `triton_grpc_error`, but may crash then.
        """
        raise InputError(f"expected protocol grpc for a stream of responses, found {self.protocol}")

    def close(self) -> None:
        self.client.close()

    def _inputs(self, inputs: Mapping[str, np.ndarray]) -> list[Any]:
        """The tensors of a request in the library's own kind."""
        converted = []
        for name, array in inputs.items():
            described = self.library.InferInput(name, array.shape, self.utils.np_to_triton_dtype(array.dtype))
            converted.append(described.set_data_from_numpy(array))
        return converted

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Inside, errors of the library become errors of this package."""
        try:
            yield
        except self.utils.InferenceServerException as error:
            if any(sign in str(error.message()) for sign in BUSY):
                raise Overloaded(f"Triton at {self.url} is busy: {one_line(error)}; try again later") from error
            if error.status() in UNREACHABLE:
                raise self._unreachable(error) from error
            kind = InputError if error.status() in REFUSED else EngineError
            raise kind(f"Triton at {self.url}: {' '.join(str(error.message()).split())}") from error
        except OSError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> EngineError:
        start = "start one with: python -m runtimes.serve"
        return EngineError(f"expected a Triton server at {self.url}, found {one_line(error)}; {start}")


class GrpcClient(TritonClient):
    """Calls the gRPC service directly with the library's messages: a request is built once and may be sent again."""

    protocol = "grpc"

    def _connect(self) -> Any:
        self.grpc = require("grpc", extra="client")
        channel = self.grpc.insecure_channel(self.url, options=ANY_LENGTH)
        self.stub = self.library.service_pb2_grpc.GRPCInferenceServiceStub(channel)
        return channel

    def _server_metadata(self) -> dict[str, Any]:
        request = self.library.service_pb2.ServerMetadataRequest()
        return self._as_dict(self.stub.ServerMetadata(request, timeout=self.timeout_s))

    def _model_metadata(self, model: str) -> dict[str, Any]:
        request = self.library.service_pb2.ModelMetadataRequest(name=model)
        return self._as_dict(self.stub.ModelMetadata(request, timeout=self.timeout_s))

    def _as_dict(self, message: Any) -> dict[str, Any]:
        to_dict = require("google.protobuf.json_format", extra="client").MessageToDict
        found: dict[str, Any] = to_dict(message, preserving_proto_field_name=True)
        return found

    def _request(self, model: str, inputs: Mapping[str, np.ndarray], sequence: Mapping[str, Any]) -> Any:
        request = self.library.service_pb2.ModelInferRequest(model_name=model)
        for name, array in inputs.items():
            datatype = self.utils.np_to_triton_dtype(array.dtype)
            request.inputs.add(name=name, datatype=datatype, shape=array.shape)
            content = self.utils.serialize_byte_tensor(array).item() if datatype == "BYTES" else array.tobytes()
            request.raw_input_contents.append(content)
        for name, value in sequence.items():
            kind = "bool_param" if isinstance(value, bool) else "int64_param"
            setattr(request.parameters[name], kind, value)
        return request

    def _submit(self, request: Any) -> "Future[Any]":
        future: Future[Any] = self.stub.ModelInfer.future(request, timeout=self.timeout_s)
        return future

    def _infer(self, request: Any) -> Any:
        return self.stub.ModelInfer(request, timeout=self.timeout_s)

    def _result(self, answered: Any) -> Any:
        return self.library.InferResult(answered)

    def stream(self, model: str, inputs: Mapping[str, np.ndarray], **sequence: Any) -> Iterator[Tensors]:
        arrived: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()
        connection = self.library.InferenceServerClient(self.url)  # of its own: it has one stream at a time
        try:
            with self._translated():
                connection.start_stream(lambda result, error: arrived.put((result, error)))
                converted = self._inputs(inputs)
                connection.async_stream_infer(model, converted, enable_empty_final_response=True, **sequence)
            final = False
            while not final:
                response, final = self._arrived(arrived)
                if response:  # the final response of a model may have no tensors
                    yield response
        finally:
            connection.stop_stream(cancel_requests=True)
            connection.close()

    def _arrived(self, arrived: "queue.Queue[tuple[Any, Exception | None]]") -> tuple[Tensors, bool]:
        """The next response, and whether it is the last one."""
        try:
            result, error = arrived.get(timeout=self.timeout_s)
        except queue.Empty as error:
            raise EngineError(
                f"Triton at {self.url}: expected the next response within {self.timeout_s:g} s, found none"
            ) from error
        with self._translated():
            if error is not None:
                raise error
            message = result.get_response()
            tensors = {output.name: result.as_numpy(output.name) for output in message.outputs}
        return tensors, message.parameters["triton_final_response"].bool_param

    @contextmanager
    def _translated(self) -> Iterator[None]:
        with super()._translated():
            try:
                yield
            except self.grpc.RpcError as error:
                raise self.utils.InferenceServerException(error.details(), str(error.code())) from error


class HttpClient(TritonClient):
    """Waits in threads: the library's own async_infer sleeps for 10 ms per request (tritonclient 2.73)."""

    protocol = "http"
    connections = 16

    def _connect(self) -> Any:
        self.threads = ThreadPoolExecutor(self.connections)
        self.own = threading.local()  # the library's client belongs to one thread
        self.own.client = self._new_client()
        return self.own.client

    def _new_client(self) -> Any:
        timeouts = {"connection_timeout": self.timeout_s, "network_timeout": self.timeout_s}
        return self.library.InferenceServerClient(self.url, **timeouts)

    def _server_metadata(self) -> dict[str, Any]:
        found: dict[str, Any] = self.client.get_server_metadata()
        return found

    def _model_metadata(self, model: str) -> dict[str, Any]:
        found: dict[str, Any] = self.client.get_model_metadata(model)
        return found

    def _request(self, model: str, inputs: Mapping[str, np.ndarray], sequence: Mapping[str, Any]) -> Any:
        return partial(self._send, model, self._inputs(inputs), sequence)

    def _send(self, model: str, inputs: list[Any], sequence: Mapping[str, Any]) -> Any:
        if not hasattr(self.own, "client"):
            self.own.client = self._new_client()
        return self.own.client.infer(model, inputs, **sequence)

    def _submit(self, request: Any) -> "Future[Any]":
        return self.threads.submit(request)

    def _infer(self, request: Any) -> Any:
        return request()

    def _result(self, answered: Any) -> Any:
        return answered

    def close(self) -> None:
        self.threads.shutdown()  # each thread's client is closed with it
        super().close()


def new_sequence() -> int:
    """A random sequence id, which no other client uses; 0 would mean none."""
    return 1 + secrets.randbelow(2**63 - 1)


CLIENTS: dict[str, type[TritonClient]] = {client.protocol: client for client in (GrpcClient, HttpClient)}


def ask(url: str, model: str, request: bytes, *, protocol: str = "grpc", timeout_s: float = 60.0) -> bytes:
    """The answer in JSON of an ensemble to a request in JSON; a recurrent model starts from zero.

    `InputError` if the server refuses the request, `EngineError` if it cannot be reached or fails.
    """
    client = CLIENTS[protocol](url, timeout_s)
    whole: dict[str, Any] = {"sequence_id": new_sequence(), "sequence_start": True, "sequence_end": True}
    try:
        outputs = client.send(model, {"request": np.array([[request]], np.object_)}, ["answer"], alone=True, **whole)()
    finally:
        client.close()
    answer: bytes = outputs["answer"].item()
    return answer

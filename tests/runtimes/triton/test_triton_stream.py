"""A decoupled model answers one request with many responses, which the client yields as they arrive."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from runtimes.errors import EngineError, InputError
from runtimes.triton.client import CLIENTS, TritonClient
from runtimes.triton.server import TritonServer
from tests import toys

pytestmark = toys.needs_server()

CONFIG = """
name: "counting"
backend: "python"
max_batch_size: 0
input { name: "upto" data_type: TYPE_INT32 dims: [1] }
output { name: "number" data_type: TYPE_INT32 dims: [1] }
output { name: "word" data_type: TYPE_STRING dims: [1] }
instance_group { count: 1 kind: KIND_CPU }
model_transaction_policy { decoupled: true }
"""
# 7 fails half-way, 99 goes on until its client has gone.
MODEL = """
import time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            upto = pb_utils.get_input_tensor_by_name(request, "upto").as_numpy()[0]
            self.count(request.get_response_sender(), int(upto))

    def count(self, sender, upto):
        for number in range(upto):
            if number == 3 and upto == 7:
                sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError("three is too much")))
                break
            tensors = [
                pb_utils.Tensor("number", np.array([number], np.int32)),
                pb_utils.Tensor("word", np.array([str(number).encode()], np.object_)),
            ]
            sender.send(pb_utils.InferenceResponse(tensors))
            while upto == 99 and number and not sender.is_cancelled():
                time.sleep(0.01)
            if sender.is_cancelled():
                break
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("streamed") / "model_repository"
    (repository / "counting" / "1").mkdir(parents=True)
    (repository / "counting" / "config.pbtxt").write_text(CONFIG)
    (repository / "counting" / "1" / "model.py").write_text(MODEL)
    return repository


@pytest.fixture
def client(server: TritonServer) -> Iterator[TritonClient]:
    client = CLIENTS["grpc"](server.grpc_url, 20)
    yield client
    client.close()


def count(client: TritonClient, upto: int) -> Iterator[int]:
    for response in client.stream("counting", {"upto": np.array([upto], np.int32)}):
        assert response["word"].tolist() == [str(response["number"].item()).encode()]
        yield response["number"].item()


def test_every_response_arrives_in_order_and_then_the_stream_ends(client: TritonClient) -> None:
    assert list(count(client, 5)) == [0, 1, 2, 3, 4]
    assert list(count(client, 0)) == []


def test_streams_of_one_client_do_not_mix(client: TritonClient) -> None:
    pairs = list(zip(count(client, 4), count(client, 4), strict=True))
    assert pairs == [(number, number) for number in range(4)]


def test_what_arrived_before_an_error_is_handed_on(client: TritonClient) -> None:
    numbers = count(client, 7)
    assert [next(numbers) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(EngineError, match="three is too much"):
        next(numbers)


def test_a_stream_that_is_left_is_cancelled(client: TritonClient) -> None:
    endless = count(client, 99)
    assert [next(endless), next(endless)] == [0, 1]
    endless.close()
    assert list(count(client, 2)) == [0, 1]  # the only instance is free again


def test_a_response_that_does_not_come_is_an_error(server: TritonServer) -> None:
    with closing(CLIENTS["grpc"](server.grpc_url, 0.5)) as impatient:
        endless = count(impatient, 99)
        assert [next(endless), next(endless)] == [0, 1]
        with pytest.raises(EngineError, match=r"expected the next response within 0\.5 s, found none"):
            next(endless)


def test_a_model_that_is_not_there_is_an_error(client: TritonClient) -> None:
    with pytest.raises(EngineError, match="unknown model"):
        list(client.stream("nowhere", {"upto": np.array([1], np.int32)}))


def test_a_stream_wants_grpc(server: TritonServer) -> None:
    with closing(CLIENTS["http"](server.http_url, 9)) as client, pytest.raises(InputError, match=r"grpc .* found http"):
        client.stream("counting", {})

"""The proxy of deploy/ passes valid requests to a real Triton, and rejects those that would harm it."""

import gzip
import http.client
import json
import os
import queue
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from export.triton.repository import drafting, publish, publish_ensemble
from runtimes.artifact import Artifact
from runtimes.host.background_server import LOOPBACK, answers, choose_ports
from runtimes.triton.client import CLIENTS
from runtimes.triton.server import CONTROL_KEY, TritonServer
from tests import toys

CONFIG = Path(__file__).parents[3] / "deploy" / "nginx.conf"
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
BEYOND_BYTES = 17 << 20

pytestmark = [
    *toys.needs_server(),
    pytest.mark.skipif(NGINX is None, reason="no nginx; install it, e.g.: apt-get install nginx-light"),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Proxy:
    http_url: str
    grpc_url: str
    metrics_url: str


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A real Triton with the model `doubling_onnx` and its ensemble `doubling`."""
    folder = tmp_path_factory.mktemp("served")
    repository = folder / "model_repository"
    with toys.known_pipeline(folder / "plugins"):
        with drafting(repository) as draft:
            version = publish(draft, toys.make(draft, toys.DOUBLING), repository)
        publish_ensemble(Artifact.load(version), repository)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIPWAY_PATH", str(toys.checkout_with_pipeline(folder / "checkout")))
        with TritonServer(repository) as server:
            yield server


@pytest.fixture(scope="module")
def proxy(server: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """nginx with the file of deploy/, at free ports before the server."""
    folder = tmp_path_factory.mktemp("nginx")
    urls = [f"{LOOPBACK}:{port}" for port in choose_ports(LOOPBACK, (None, None, None))]
    config = CONFIG.read_text().replace("/tmp/", f"{folder}/")
    for port, url, behind in zip((8000, 8001, 8002), urls, behind_proxy(server), strict=True):
        config = config.replace(f"listen {port}", f"listen {url}").replace(f"{LOOPBACK}:1{port}", behind)
    (folder / "nginx.conf").write_text(config)
    as_us = "user root;" if os.geteuid() == 0 else ""  # its workers would be nobody's
    command = [str(NGINX), "-e", "stderr", "-c", str(folder / "nginx.conf"), "-g", f"daemon off; {as_us}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as running:
        try:
            toys.wait_for(lambda: running.poll() is not None or answers(urls[0], "/v2/health/ready"), 20)
            assert running.poll() is None, running.stderr and running.stderr.read().decode()
            yield Proxy(http_url=urls[0], grpc_url=urls[1], metrics_url=urls[2])
        finally:
            running.terminate()


def behind_proxy(server: TritonServer) -> tuple[str, str, str]:
    return server.http_url, server.grpc_url, server.metrics_url


@pytest.fixture(autouse=True)
def the_server_lives(server: TritonServer) -> Iterator[None]:
    yield
    assert toys.ask(server, "doubling", '{"x": [[1, 2, 3]]}')["last"] == [2.0, 4.0, 6.0]


def post(url: str, path: str, body: str | bytes | Iterable[bytes], **headers: str) -> tuple[int, Any]:
    """Status and JSON of the answer; an iterable is sent in chunks, without saying how long it is."""
    connection = http.client.HTTPConnection(url, timeout=60)
    try:
        connection.request("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def kserve(request: str) -> str:
    tensor = {"name": "request", "datatype": "BYTES", "shape": [1, 1], "data": [request]}
    return json.dumps({"inputs": [tensor]})


RIGHT = '{"x": [[1, 2, 3]]}'
INFER = "/v2/models/doubling/infer"


def given(values: int = 3, value: float = 1.0) -> list[Any]:
    x = tritonclient.grpc.InferInput("x", [1, 1, values], "FP32")
    return [x.set_data_from_numpy(np.full((1, 1, values), value, np.float32))]


@pytest.mark.parametrize("type_", ["application/json", "Application/JSON; charset=utf-8"])
def test_a_request_in_json_passes(proxy: Proxy, type_: str) -> None:
    status, answer = post(proxy.http_url, INFER, kserve(RIGHT), Content_Type=type_)
    assert status == 200
    (output,) = answer["outputs"]
    assert json.loads(output["data"][0])["last"] == [2.0, 4.0, 6.0]


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_our_clients_see_no_difference(proxy: Proxy, protocol: str) -> None:
    client = CLIENTS[protocol](proxy.grpc_url if protocol == "grpc" else proxy.http_url, timeout_s=60)
    x = np.ones((2, 2, toys.WIDTH), np.float32)
    for _ in range(3):
        np.testing.assert_array_equal(client.send("doubling_onnx", {"x": x}, ["y"])()["y"], 2 * x)
    assert client.server_version() == "2.51.0"
    assert client.metadata("doubling")["name"] == "doubling"
    client.close()


def test_a_request_as_large_as_a_pipeline_allows_passes(proxy: Proxy) -> None:
    request = json.dumps({"x": [[1, 2, 3]], "more": '"' * (2_000_000)})  # quoted twice: 8 MB
    assert post(proxy.http_url, INFER, kserve(request), Content_Type="application/json")[0] == 200


@pytest.mark.parametrize("in_chunks", [False, True])
def test_a_request_that_is_too_large_over_http_is_refused(proxy: Proxy, in_chunks: bool) -> None:
    body = b"x" * BEYOND_BYTES
    sent = (body[start : start + 65536] for start in range(0, len(body), 65536)) if in_chunks else body
    status, answer = post(proxy.http_url, INFER, sent, Content_Type="application/json")
    assert (status, answer) == (413, {"error": "expected a request of at most 16 MiB; send less at once"})


def test_a_request_that_is_too_large_over_grpc_is_refused(proxy: Proxy) -> None:
    with tritonclient.grpc.InferenceServerClient(proxy.grpc_url) as client:
        with pytest.raises(InferenceServerException, match="expected a request of at most 16 MiB; send") as refused:
            client.infer("doubling_onnx", given(BEYOND_BYTES // 4))
        assert refused.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
        assert client.infer("doubling_onnx", given()).as_numpy("y").tolist() == [[[2.0, 2.0, 2.0]]]


@pytest.mark.parametrize("type_", ["application/x-www-form-urlencoded", "text/plain", "application/json, text/plain"])
def test_a_body_of_another_type_is_refused(proxy: Proxy, type_: str) -> None:
    status, answer = post(proxy.http_url, INFER, b"{" + b"x" * (5 << 20) + b"}", Content_Type=type_)
    assert status == 415
    assert answer["error"].startswith("expected Content-Type application/json")


@pytest.mark.parametrize("order", [1, -1])
def test_a_second_type_does_not_reach_the_server(proxy: Proxy, order: int) -> None:
    connection = http.client.HTTPConnection(proxy.http_url, timeout=60)
    connection.putrequest("POST", INFER)
    for type_ in ("application/json", "application/x-www-form-urlencoded")[::order]:
        connection.putheader("Content-Type", type_)
    body = kserve(json.dumps({"x": [[1, 2, 3]], "more": "x" * (5 << 20)})).encode()
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    assert connection.getresponse().status in (400, 415)
    connection.close()


def test_a_compressed_body_is_refused(proxy: Proxy) -> None:
    body = gzip.compress(kserve(RIGHT).encode())
    status, answer = post(proxy.http_url, INFER, body, Content_Type="application/json", Content_Encoding="gzip")
    assert (status, answer) == (415, {"error": "expected a body that is not compressed"})
    with (
        tritonclient.grpc.InferenceServerClient(proxy.grpc_url) as client,
        pytest.raises(InferenceServerException, match="not compressed") as refused,
    ):
        client.infer("doubling_onnx", given(), compression_algorithm="gzip")
    assert refused.value.status() == "StatusCode.UNIMPLEMENTED"


CLOSED = [
    "/v2/repository/index",
    "/v2/repository/models/doubling/load",
    "/v2//repository/index",
    "/v2/models/../repository/index",
    "/v2/models/%2e%2e/repository/index",
    "/v2/repository/index/../../models/doubling/ready",
    "/v2/repository%2findex",
    "/v2/models/doubling%2fready",
    "/v2/logging",
    "/v2/trace/setting",
    "/v2/models/doubling/trace/setting",
    "/v2/systemsharedmemory/status",
    "/v2/cudasharedmemory/status",
    "/metrics",
]


@pytest.mark.parametrize("path", CLOSED)
def test_what_controls_the_server_is_not_reachable_even_with_the_key(
    proxy: Proxy, server: TritonServer, path: str
) -> None:
    headers = {"Content-Type": "application/json", CONTROL_KEY: server.control_key}
    assert post(proxy.http_url, path, "{}", **headers)[0] == 404


def test_the_key_is_not_passed_on_over_grpc(proxy: Proxy, server: TritonServer) -> None:
    key = {f"triton-grpc-protocol-{CONTROL_KEY}": server.control_key}
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        assert client.get_model_repository_index(headers=key).models
    with tritonclient.grpc.InferenceServerClient(proxy.grpc_url) as client:
        for control in (client.get_model_repository_index, client.get_log_settings, client.get_trace_settings):
            with pytest.raises(InferenceServerException, match="not passed on to the server") as refused:
                control(headers=key)
            assert refused.value.status() == "StatusCode.UNIMPLEMENTED"


def test_a_stream_goes_on_after_an_error_whatever_its_headers(proxy: Proxy) -> None:
    arrived: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with tritonclient.grpc.InferenceServerClient(proxy.grpc_url) as client:
        # With this header Triton would end the stream at the error, and may crash.
        client.start_stream(lambda result, error: arrived.put((result, error)), headers={"triton_grpc_error": "true"})
        client.async_stream_infer("doubling_onnx", given(value=np.nan))
        assert "expected finite numbers" in str(arrived.get(timeout=60)[1])
        client.async_stream_infer("doubling_onnx", given())
        result, error = arrived.get(timeout=60)
        assert error is None
        assert result.as_numpy("y").tolist() == [[[2.0, 2.0, 2.0]]]
        client.stop_stream()


def test_health_and_metrics_are_open_and_nothing_beside_them(proxy: Proxy) -> None:
    assert answers(proxy.http_url, "/v2/health/ready")
    assert answers(proxy.http_url, "/v2/models/doubling/ready")
    assert answers(proxy.http_url, "/v2/models/doubling/versions/1/ready")
    assert answers(proxy.metrics_url, "/metrics")
    assert not answers(proxy.metrics_url, "/v2/health/ready")
    check = grpc.insecure_channel(proxy.grpc_url).unary_unary("/grpc.health.v1.Health/Check")
    assert check(b"", timeout=60) == b"\x08\x01"  # SERVING


def test_every_method_of_the_service_is_passed_on_or_controls_the_server() -> None:
    service = tritonclient.grpc.service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    pattern = re.search(r"location ~ (\S*GRPCInferenceService\S*) \{", CONFIG.read_text())
    assert pattern
    closed = {name for name in service.methods_by_name if not re.match(pattern[1], f"/{service.full_name}/{name}")}
    assert all(re.match("Repository|SystemShared|CudaShared|TraceSetting|LogSettings", name) for name in closed)
    assert len(closed) == 11

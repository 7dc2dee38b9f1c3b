"""With a faulty model, process or client, valid requests are still answered."""

import http.client
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from export.triton.repository import drafting, publish
from runtimes.triton.server import CONTROL_KEY, TritonServer
from runtimes.triton.stub_health import STUB, StubWatch, is_zombie
from tests import toys
from tests.runtimes.triton.test_triton_lifetime import command_lines, left_behind

pytestmark = toys.needs_server()


def publish_toy(repository: Path, **changes: object) -> Path:
    with drafting(repository) as draft:
        return publish(draft, toys.make(draft, toys.DOUBLING, **changes), repository)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    publish_toy(tmp_path / "model_repository")
    return tmp_path / "model_repository"


@pytest.fixture
def server(repository: Path) -> Iterator[TritonServer]:
    with TritonServer(repository, poll_s=1, strict=False) as server:
        yield server


def doubled(server: TritonServer) -> float:
    """What the served model makes of 1."""
    x = tritonclient.grpc.InferInput("x", [1, 1, toys.WIDTH], "FP32")
    x.set_data_from_numpy(np.ones((1, 1, toys.WIDTH), np.float32))
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        return float(client.infer("doubling_onnx", [x], client_timeout=20).as_numpy("y")[0, 0, 0])


def test_a_corrupt_new_version_does_not_replace_a_good_one(server: TritonServer, repository: Path) -> None:
    version = publish_toy(repository, factor=5.0, key="five")
    (version / "model.onnx").write_bytes(b"not a model")
    toys.wait_for(lambda: "expected sha256" in server.log_tail(200))
    for _ in range(20):
        assert doubled(server) == 2.0
    publish_toy(repository, factor=7.0, key="seven")
    toys.wait_for(lambda: doubled(server) == 7.0)


def processes(server: TritonServer, program: str) -> list[int]:
    """Ids of the server's processes whose program is so named."""
    found = []
    for path in command_lines():
        try:
            line = path.read_bytes().decode(errors="replace")
        except OSError:  # it has ended meanwhile
            continue
        if line.split("\0")[0].endswith(program) and server.shared_memory_prefix in line:
            found.append(int(path.parent.name))
    return found


def test_a_killed_stub_is_replaced(server: TritonServer) -> None:
    watch = StubWatch(server.shared_memory_prefix)
    assert watch.revive() == []
    (stub,) = processes(server, STUB)
    os.kill(stub, signal.SIGKILL)
    toys.wait_for(lambda: is_zombie(stub))
    with pytest.raises(InferenceServerException, match="not healthy"):
        doubled(server)
    assert watch.revive() == ["doubling_onnx"]
    assert watch.revive() == []

    def answered() -> bool:
        try:
            return doubled(server) == 2.0
        except InferenceServerException:  # it still finds the dead stub
            return False

    toys.wait_for(answered)
    assert processes(server, STUB) not in ([], [stub])


def test_a_stub_that_ended_with_its_version_is_not_revived(server: TritonServer, repository: Path) -> None:
    watch = StubWatch(server.shared_memory_prefix)
    for factor in (5.0, 7.0):
        publish_toy(repository, factor=factor, key=f"of {factor}")
        toys.wait_for(lambda factor=factor: watch.revive() or doubled(server) == factor)
    toys.wait_for(lambda: watch.revive() or len(processes(server, STUB)) == 2)  # the newest and the one before
    assert watch.revive() == []
    assert doubled(server) == 7.0


def test_a_stub_whose_version_is_gone_is_let_go(tmp_path: Path) -> None:
    watch = StubWatch("no server")
    with subprocess.Popen(["true"]) as ended:
        toys.wait_for(lambda: is_zombie(ended.pid))
        watch.known = {ended.pid: tmp_path / "doubling_onnx" / "1"}
        assert watch.revive() == []


def test_nothing_is_left_of_a_killed_server_and_another_can_start(server: TritonServer, repository: Path) -> None:
    (core,) = processes(server, "tritonserver")
    os.kill(core, signal.SIGKILL)
    toys.wait_for(lambda: not server.running)
    toys.wait_for(lambda: not left_behind(server.shared_memory_prefix))
    with TritonServer(repository) as another:
        assert doubled(another) == 2.0


CONTROLS = [
    ("POST", "/v2/repository/index"),
    ("POST", "/v2/repository/models/doubling_onnx/unload"),
    ("POST", "/v2/repository/models/other/load"),
    ("POST", "/v2/logging"),
    ("POST", "/v2/trace/setting"),
    ("POST", "/v2/systemsharedmemory/region/x/register"),
    ("POST", "/v2/cudasharedmemory/region/x/register"),
]


def status(server: TritonServer, method: str, path: str, key: str = "") -> int:
    connection = http.client.HTTPConnection(server.http_url, timeout=120)
    try:
        connection.request(method, path, "{}", {"Content-Type": "application/json", CONTROL_KEY: key})
        return connection.getresponse().status
    finally:
        connection.close()


def test_clients_may_ask_but_not_control(server: TritonServer, repository: Path) -> None:
    assert [status(server, *control) for control in CONTROLS] == [403] * len(CONTROLS)
    client = tritonclient.grpc.InferenceServerClient(server.grpc_url)
    for control in (client.get_model_repository_index, client.get_log_settings, client.get_trace_settings):
        with pytest.raises(InferenceServerException, match="restricted"):
            control()
    assert status(server, *CONTROLS[0], key=server.control_key) == 200
    assert status(server, "GET", "/v2/models/doubling_onnx") == 200
    assert doubled(server) == 2.0
    with TritonServer(repository, open_to_all=True) as opened:
        assert status(opened, *CONTROLS[0]) == status(opened, *CONTROLS[3]) == 200


def test_no_name_leads_out_of_the_repository(server: TritonServer) -> None:
    client = tritonclient.grpc.InferenceServerClient(server.grpc_url)
    for name in ("..", "../doubling_onnx", "..%2fdoubling_onnx", "doubling_onnx/../x", "%00"):
        for path in (f"/v2/models/{name}", f"/v2/models/{name}/config", f"/v2/models/doubling_onnx/versions/{name}"):
            assert status(server, "GET", path) in (400, 404)
        with pytest.raises(InferenceServerException, match=r"unknown model|not found"):
            client.get_model_metadata(name)
    assert doubled(server) == 2.0


def test_memory_stays_flat_while_requests_are_refused(server: TritonServer) -> None:
    def refuse(count: int) -> None:
        x = tritonclient.grpc.InferInput("x", [1, 1, toys.WIDTH + 1], "FP32")
        x.set_data_from_numpy(np.ones((1, 1, toys.WIDTH + 1), np.float32))
        with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
            for _ in range(count):
                with pytest.raises(InferenceServerException):
                    client.infer("doubling_onnx", [x])

    refuse(500)
    before = resident_bytes(server)
    refuse(2000)
    toys.wait_for(lambda: resident_bytes(server) - before < 8 << 20)


def resident_bytes(server: TritonServer) -> int:
    """Memory of the server and its stubs."""
    pages = 0
    for process in (*processes(server, "tritonserver"), *processes(server, STUB)):
        pages += int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")

"""The answers of a real Triton are those of the artifacts, over both protocols, and it leaves no process or file."""

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from export.triton.repository import drafting, publish, publish_ensemble
from runtimes.artifact import Artifact
from runtimes.errors import EngineError, InputError
from runtimes.runtime import Runtime, open_runtime
from runtimes.tensors import Signature
from runtimes.triton.server import TritonServer
from tests import toys

ROOT = Path(__file__).parents[3]
LIBRARIES = {"grpc": tritonclient.grpc, "http": tritonclient.http}


pytestmark = toys.needs_server()


def publish_toy(repository: Path, signature: Signature, **changes: object) -> Path:
    with drafting(repository) as draft:
        version = publish(draft, toys.make(draft, signature, **changes), repository)
    publish_ensemble(Artifact.load(version), repository)
    return version


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    repository = tmp_path_factory.mktemp("served") / "model_repository"
    with toys.known_pipeline(tmp_path_factory.mktemp("plugins")):
        publish_toy(repository, toys.RUNNING)
        publish_toy(repository, toys.DOUBLING)
        yield repository


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIPWAY_PATH", str(toys.checkout_with_pipeline(tmp_path_factory.mktemp("checkout"))))
        with TritonServer(repository, poll_s=1) as server:
            yield server


@pytest.fixture(params=["grpc", "http"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def url(server: TritonServer, protocol: str) -> str:
    return server.grpc_url if protocol == "grpc" else server.http_url


@pytest.fixture
def client(url: str, protocol: str) -> Any:
    return LIBRARIES[protocol].InferenceServerClient(url)


@pytest.fixture
def served(repository: Path, url: str, protocol: str) -> Callable[[str], Runtime]:
    return lambda name: open_runtime(repository / name / "1", engine="triton", url=url, protocol=protocol)


def inputs(protocol: str, **arrays: np.ndarray) -> list[Any]:
    library, types = LIBRARIES[protocol], {"f": "FP32", "i": "INT64", "O": "BYTES"}
    return [
        library.InferInput(name, array.shape, types[array.dtype.kind]).set_data_from_numpy(array)
        for name, array in arrays.items()
    ]


def ask(client: Any, protocol: str, model: str, request: object, **sequence: Any) -> Any:
    text = request if isinstance(request, bytes) else json.dumps(request).encode()
    given = inputs(protocol, request=np.array([[text]], object))
    return json.loads(client.infer(model, given, **sequence).as_numpy("answer")[0, 0])


def random_x(rng: np.random.Generator, batch: int = 1, time: int = 4) -> np.ndarray:
    return rng.normal(size=(batch, time, toys.WIDTH)).astype(np.float32)


@pytest.mark.parametrize("name", ["running_onnx", "doubling_onnx"])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 4), (8, 16)])
def test_windows_are_answered_as_in_process(
    repository: Path, served: Callable[[str], Runtime], name: str, batch: int, length: int
) -> None:
    arrays = {"x": random_x(np.random.default_rng(batch), batch, length)}
    with served(name) as remote, open_runtime(repository / name / "1") as local:
        found, expected = remote.fresh(arrays), local.fresh(arrays)
        assert remote.provider.startswith("triton 2.")
    for spec in remote.signature.outputs:
        np.testing.assert_array_equal(found[spec.name], expected[spec.name])


@pytest.mark.parametrize("name", ["running_onnx", "doubling_onnx"])
def test_a_repeated_request_is_answered_each_time_as_a_fresh_one(served: Callable[[str], Runtime], name: str) -> None:
    arrays, other = ({"x": random_x(np.random.default_rng(seed), 2)} for seed in (0, 1))
    with served(name) as runtime:
        call, expected = runtime.repeated(arrays), runtime.fresh(arrays)
        for _ in range(3):
            found = call()
            assert found.keys() == expected.keys()
            for output, array in found.items():
                np.testing.assert_array_equal(array, expected[output])
            runtime.fresh(other)  # what happens between makes no difference
        with pytest.raises(InputError, match="expected finite numbers"):
            runtime.repeated({"x": arrays["x"] * np.nan})()


def test_a_stream_of_300_steps_says_what_the_model_in_process_says(
    repository: Path, served: Callable[[str], Runtime]
) -> None:
    rng = np.random.default_rng(0)
    with served("running_onnx") as remote, open_runtime(repository / "running_onnx" / "1") as local:
        far, near = remote.stream(2), local.stream(2)
        for step in range(300):
            if step == 150:
                far.reset([1])
                near.reset([1])
            arrays = {"x": random_x(rng, 2, int(rng.integers(1, 5)))}
            np.testing.assert_array_equal(far.step(arrays)["y"], near.step(arrays)["y"])
        far.close()
        far.close()


def test_sequences_at_the_same_time_do_not_mix(served: Callable[[str], Runtime]) -> None:
    def follow(seed: int) -> None:
        rng, h = np.random.default_rng(seed), np.zeros(toys.WIDTH, np.float32)
        stream = remote.stream(1)
        for _ in range(40):
            x = random_x(rng)
            y, h = toys.run_by_hand(x[0], h)
            np.testing.assert_allclose(stream.step({"x": x})["y"][0], y, atol=1e-4)
        stream.close()

    with served("running_onnx") as remote, ThreadPoolExecutor(6) as pool:
        list(pool.map(follow, range(6)))


def test_steps_of_different_sequences_are_batched(server: TritonServer, repository: Path) -> None:
    with open_runtime(repository / "running_onnx" / "1", engine="triton", url=server.grpc_url) as remote:
        stream = remote.stream(8)
        for _ in range(20):
            stream.step({"x": np.ones((8, 2, toys.WIDTH), np.float32)})
        stream.close()
    statistics = tritonclient.grpc.InferenceServerClient(server.grpc_url).get_inference_statistics("running_onnx")
    assert max(batch.batch_size for batch in statistics.model_stats[0].batch_stats) > 1


def test_a_sequence_needs_a_start_and_ends_at_its_end(client: Any, protocol: str) -> None:
    given = inputs(protocol, x=np.ones((1, 2, toys.WIDTH), np.float32))
    with pytest.raises(InferenceServerException, match="must specify the START flag"):
        client.infer("running_onnx", given, sequence_id=12345)
    client.infer("running_onnx", given, sequence_id=12345, sequence_start=True)
    client.infer("running_onnx", given, sequence_id=12345, sequence_end=True)
    with pytest.raises(InferenceServerException, match="must specify the START flag"):
        client.infer("running_onnx", given, sequence_id=12345)


WRONG = {
    "NaN": ({"x": np.full((1, 2, 3), np.nan, np.float32)}, "input 'x': expected finite numbers, found NaN"),
    "too long": ({"x": np.zeros((1, 17, 3), np.float32)}, r"time 1\.\.16, found \[1, 17, 3\]"),
    "too wide": ({"x": np.zeros((1, 2, 4), np.float32)}, "unexpected shape for input 'x'"),
    "too many": ({"x": np.zeros((9, 2, 3), np.float32)}, "must be <= 8"),
    "dtype": ({"x": np.zeros((1, 2, 3), np.int64)}, "data-type"),
    "missing": ({}, "expected 1 inputs but got 0"),
    "unknown": ({"z": np.zeros((1, 2, 3), np.float32)}, "unexpected inference input 'z'"),
}


@pytest.mark.parametrize(("arrays", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_request_is_refused_and_the_next_is_answered(
    client: Any, protocol: str, arrays: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(InferenceServerException, match=message) as refused:
        client.infer("doubling_onnx", inputs(protocol, **arrays))
    assert refused.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
    right = np.ones((1, 2, toys.WIDTH), np.float32)
    np.testing.assert_array_equal(client.infer("doubling_onnx", inputs(protocol, x=right)).as_numpy("y"), 2 * right)


def test_a_wrong_request_spoils_no_other_of_its_batch(server: TritonServer) -> None:
    client = tritonclient.grpc.InferenceServerClient(server.grpc_url)

    def send(value: float) -> object:
        try:
            given = inputs("grpc", x=np.full((1, 2, toys.WIDTH), value, np.float32))
            return client.infer("doubling_onnx", given).as_numpy("total")[0, 0]
        except InferenceServerException as error:
            return error.status()

    values = [float(value) if value % 4 else np.nan for value in range(32)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(send, values))
    expected = ["StatusCode.INVALID_ARGUMENT" if np.isnan(value) else 12 * value for value in values]
    assert answers == expected


def test_a_request_in_json_is_answered_in_json(client: Any, protocol: str) -> None:
    answer = ask(client, protocol, "doubling", {"x": [[1, 2, 3], [4, 5, 6]]})
    assert answer == {"last": [8.0, 10.0, 12.0], "unit": "metre", "note": "é"}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (b"{", "request 0: expected JSON in UTF-8, found Expecting property name"),
        (b"\xff\xfe\xfd", "request 0: expected JSON in UTF-8"),
        ({"y": 1}, "expected a request with 'x', found none"),
        ({"x": [[1, 2]]}, r"input 'x': expected shape \[batch, time, 3\].*found \[1, 1, 2\]"),
        ({"x": [[1, 2, float("nan")]]}, "input 'x': expected finite numbers"),
    ],
    ids=["no JSON", "no UTF-8", "missing field", "shape", "NaN"],
)
def test_a_wrong_request_in_json_is_refused_and_the_next_is_answered(
    client: Any, protocol: str, request_: object, message: str
) -> None:
    with pytest.raises(InferenceServerException, match=message) as refused:
        ask(client, protocol, "doubling", request_)
    assert refused.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
    assert ask(client, protocol, "doubling", {"x": [[1, 2, 3]]})["last"] == [2.0, 4.0, 6.0]


def test_a_request_of_5_mib_is_refused_in_one_line_and_the_next_is_answered(client: Any, protocol: str) -> None:
    with pytest.raises(InferenceServerException) as refused:
        ask(client, protocol, "doubling", {"x": [[1, 2, 3]], "more": "x" * (5 << 20)})
    assert re.search(r"request 0: expected at most 4194304 bytes, found \d+; send less at once$", str(refused.value))
    assert "\n" not in str(refused.value)
    assert ask(client, protocol, "doubling", {"x": [[1, 2, 3]]})["last"] == [2.0, 4.0, 6.0]


def test_a_tensor_of_5_mib_is_refused_in_one_line_and_the_next_is_answered(client: Any, protocol: str) -> None:
    with pytest.raises(InferenceServerException, match=r"time 1\.\.16, found \[1, 500000, 3\]") as refused:
        client.infer("doubling_onnx", inputs(protocol, x=np.zeros((1, 500_000, 3), np.float32)))
    assert "\n" not in str(refused.value)
    assert ask(client, protocol, "doubling", {"x": [[1, 2, 3]]})["last"] == [2.0, 4.0, 6.0]


def test_a_sequence_goes_on_through_the_ensemble(client: Any, protocol: str) -> None:
    rng, h = np.random.default_rng(0), {7: np.zeros(toys.WIDTH, np.float32), 8: np.zeros(toys.WIDTH, np.float32)}
    for step in range(10):
        for own in h:
            x = random_x(rng)[0]
            y, h[own] = toys.run_by_hand(x, h[own])
            flags = {"sequence_id": own, "sequence_start": step == 0, "sequence_end": step == 9}
            answer = ask(client, protocol, "running", {"x": x.tolist()}, **flags)
            np.testing.assert_allclose(answer["last"], y[-1], atol=1e-5)
    with pytest.raises(InferenceServerException, match="START flag"):
        ask(client, protocol, "running", {"x": x.tolist()}, sequence_id=7)


def test_state_from_a_client_is_refused_unless_it_is_zero(served: Callable[[str], Runtime]) -> None:
    x, h = np.ones((1, 2, toys.WIDTH), np.float32), np.zeros((1, toys.WIDTH), np.float32)
    with served("running_onnx") as remote:
        np.testing.assert_array_equal(remote.run({"x": x, "h": h})["y"], remote.run({"x": x})["y"])
        with pytest.raises(InputError, match="the server keeps the state; use stream"):
            remote.run({"x": x, "h": h + 1})


def test_a_model_that_is_not_what_the_artifact_says_is_refused(repository: Path, url: str, protocol: str) -> None:
    options = {"engine": "triton", "url": url, "protocol": protocol}
    with pytest.raises(EngineError, match=r"doubling_onnx at .*: expected outputs"):
        open_runtime(repository / "running_onnx" / "1", model="doubling_onnx", **options).open()
    with pytest.raises(EngineError, match="unknown model: 'nix'"):
        open_runtime(repository / "running_onnx" / "1", model="nix", **options).open()


def test_a_server_that_is_not_there_is_named(repository: Path, protocol: str) -> None:
    with pytest.raises(EngineError, match=r"expected a Triton server at 127\.0\.0\.1:1, found .*start one with"):
        open_runtime(repository / "running_onnx" / "1", engine="triton", url="127.0.0.1:1", protocol=protocol).open()


def test_serving_writes_nothing_into_the_repository_and_loads_nothing_twice(
    server: TritonServer, repository: Path
) -> None:
    assert not list(repository.rglob("*.pyc"))
    log = server.log_tail(2_000)
    assert log.count('"loading: doubling_encode:1"') == log.count('"loading: running_onnx:1"') == 1


def test_what_is_published_is_served_soon_and_without_a_gap(server: TritonServer, repository: Path) -> None:
    client = tritonclient.grpc.InferenceServerClient(server.grpc_url)
    given = inputs("grpc", x=np.ones((1, 1, toys.WIDTH), np.float32))
    publish_toy(repository, toys.DOUBLING, model="changing", factor=2.0)
    toys.wait_for(lambda: client.is_model_ready("changing"))
    publish_toy(repository, toys.DOUBLING, model="changing", factor=5.0, key="five")
    seen = set()

    def five_is_served() -> bool:
        seen.add(float(client.infer("changing_onnx", given).as_numpy("y")[0, 0, 0]))  # must never fail
        return 5.0 in seen

    toys.wait_for(five_is_served)
    assert seen == {2.0, 5.0}

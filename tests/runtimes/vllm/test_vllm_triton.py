"""The bundled Triton core serves vllm entries by a real vLLM, as NVIDIA's backend would: text in, text out."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes import predict
from runtimes.engines.triton_vllm import TritonVllmRuntime
from runtimes.engines.vllm import VllmRuntime
from runtimes.errors import EngineError, InputError
from runtimes.runtime import open_runtime
from runtimes.tensors import Tensors
from runtimes.triton.client import CLIENTS, TritonClient
from runtimes.triton.server import TritonServer
from tests import small_decoders, toys

pytestmark = [*toys.needs_server(), pytest.mark.vllm]
# As NVIDIA's own sample has it: the backend completes the rest.
CONFIG = 'backend: "vllm"\ninstance_group [ {{ count: 1 kind: KIND_MODEL }} ]\nname: "{name}"\n'
GENERATOR, EMBEDDER = "generator_vllm", "embedder_vllm"
GREEDY = {"max_tokens": 8, "temperature": 0}
PROMPT = small_decoders.TEXTS[0]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("entries") / "model_repository"
    for name, make in ((GENERATOR, small_decoders.make_generator), (EMBEDDER, small_decoders.make_embedder)):
        make(repository / name / "1")
        (repository / name / "config.pbtxt").write_text(CONFIG.format(name=name))
    small_decoders.opened(repository / GENERATOR / "1")  # skips
    return repository


@pytest.fixture
def client(server: TritonServer) -> Iterator[TritonClient]:
    with closing(CLIENTS["grpc"](server.grpc_url, 60)) as client:
        yield client


@pytest.fixture
def served(repository: Path, server: TritonServer) -> Iterator[TritonVllmRuntime]:
    with served_at(repository, GENERATOR, server) as runtime:
        yield runtime


def served_at(repository: Path, name: str, server: TritonServer) -> TritonVllmRuntime:
    runtime = open_runtime(repository / name / "1", engine="triton_vllm", url=server.grpc_url)
    assert isinstance(runtime, TritonVllmRuntime)
    return runtime


def tensor(value: object) -> np.ndarray:
    return np.array([value]) if isinstance(value, bool) else np.array([str(value).encode()], np.object_)


def ask(client: TritonClient, name: str, text: str = PROMPT, **inputs: object) -> list[Tensors]:
    given = {key: tensor(json.dumps(value) if isinstance(value, dict) else value) for key, value in inputs.items()}
    return list(client.stream(name, {"text_input": tensor(text), **given}))


def test_a_text_goes_on_as_in_the_engine_itself(client: TritonClient, vllm_generator: tuple[VllmRuntime, Any]) -> None:
    (whole,) = vllm_generator[0].complete([PROMPT], logprobs=0, **GREEDY)
    (response,) = ask(client, GENERATOR, sampling_parameters=GREEDY)
    assert response["text_output"].item().decode() == PROMPT + whole.text
    asked = {f"return_{name}": True for name in ("finish_reason", "logprobs", "num_input_tokens", "num_output_tokens")}
    (full,) = ask(client, GENERATOR, sampling_parameters=GREEDY, exclude_input_in_output=True, **asked)
    assert full["text_output"].item().decode() == whole.text
    assert full["finish_reason"].item() == b"length"
    assert (full["num_input_tokens"].item(), full["num_output_tokens"].item()) == (whole.prompt_tokens, 8)
    tokens = json.loads(full["logprobs"].item())
    assert [int(name) for token in tokens for name in token] == list(whole.token_ids)
    logprobs = [each["logprob"] for token in tokens for each in token.values()]
    np.testing.assert_allclose(logprobs, whole.logprobs, atol=1e-4)


def test_a_stream_has_several_responses(client: TritonClient, served: TritonVllmRuntime) -> None:
    responses = ask(client, GENERATOR, sampling_parameters=GREEDY, stream=True, return_num_input_tokens=True)
    assert 1 < len(responses) <= 8  # a busy vLLM may send two tokens at once
    assert len({response["num_input_tokens"].item() for response in responses}) == 1
    (whole,) = served.complete([PROMPT], **GREEDY)
    pieces = list(served.complete_stream(PROMPT, **GREEDY))
    assert "".join(piece.text for piece in pieces) == whole.text.rstrip("\ufffd")
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]


def test_requests_of_many_clients_are_under_way_at_once(served: TritonVllmRuntime) -> None:
    prompts = [PROMPT[:length] for length in range(10, 26)]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda prompt: served.complete([prompt], **GREEDY)[0].text, prompts))
    assert together == [completion.text for completion in served.complete(prompts, **GREEDY)]


def test_several_completions_of_one_request(client: TritonClient) -> None:
    sampling = {"n": 3, "max_tokens": 4, "temperature": 1.0, "seed": 1}
    (response,) = ask(client, GENERATOR, sampling_parameters=sampling, exclude_input_in_output=True)
    assert response["text_output"].shape == (3,)


def test_vectors_are_those_of_torch(
    client: TritonClient, repository: Path, server: TritonServer, vllm_embedder: tuple[VllmRuntime, Any]
) -> None:
    inputs = small_decoders.row_inputs([5, 9, 1])
    with served_at(repository, EMBEDDER, server) as runtime:
        np.testing.assert_allclose(runtime.run(inputs)["vector"], vllm_embedder[0].run(inputs)["vector"], atol=1e-5)
        np.testing.assert_allclose(runtime.embed([PROMPT]), vllm_embedder[0].embed([PROMPT]), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        (GENERATOR, {"sampling_parameters": "[]"}, r"sampling_parameters: expected a JSON object, found \[\]"),
        (GENERATOR, {"sampling_parameters": "{"}, "sampling_parameters: expected JSON in UTF-8"),
        (GENERATOR, {"sampling_parameters": {"temperature": -1}}, "vLLM refuses the request: .*temperature"),
        (GENERATOR, {"sampling_parameters": {"lora_name": "a"}}, "expected no lora_name"),
        (GENERATOR, {"stream": True, "exclude_input_in_output": False}, "expected true for a stream"),
        (GENERATOR, {"stream": True, "sampling_parameters": {"n": 2}}, "expected n = 1 for a stream, found 2"),
        (GENERATOR, {"embedding_request": {"input": "a"}}, "its model does not support /v1/embeddings"),
        (GENERATOR, {"text": "word " * 400}, "vLLM refuses the request: .*context length is 64"),
        (EMBEDDER, {}, "its model does not support /v1/completions"),
        (EMBEDDER, {"embedding_request": {}}, "expected 'input' with a text or token ids"),
    ],
)
def test_a_wrong_request_fails_alone(client: TritonClient, name: str, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        ask(client, name, **inputs)


def test_scores_are_not_to_be_had(served: TritonVllmRuntime) -> None:
    with pytest.raises(InputError, match="found one for scores, which Triton's vllm backend does not return"):
        served.run(small_decoders.row_inputs([5, 9]))


@pytest.mark.parametrize("name", ["generator", "embedder"])
def test_predict_answers_alike_from_the_server_and_the_engine(
    name: str,
    repository: Path,
    server: TritonServer,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = {"text": PROMPT} if name == "embedder" else {"text": PROMPT, "max_tokens": 8}
    (tmp_path / "request.json").write_text(json.dumps(asked))
    arguments = [name, "--target", "vllm", "--repository", str(repository), "--input", str(tmp_path / "request.json")]
    assert predict.main([*arguments, "--url", server.grpc_url]) == 0
    from_server = json.loads(capsys.readouterr().out)
    engine = request.getfixturevalue(f"vllm_{name}")[0]
    monkeypatch.setattr(engine.__class__, "__enter__", lambda self: self)
    monkeypatch.setattr(engine.__class__, "__exit__", lambda self, *_: None)
    monkeypatch.setattr(predict, "open_runtime", lambda *_, **__: engine)  # it is open; another would take a minute
    assert predict.main(arguments) == 0
    itself = json.loads(capsys.readouterr().out)
    if name == "embedder":
        np.testing.assert_allclose(from_server["vector"], itself["vector"], atol=1e-5)
    else:
        assert from_server == itself
        assert from_server["finish_reason"] == "length"

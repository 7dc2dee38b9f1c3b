"""The last hop: every policy on a real Triton agrees with the checkpoint, also over a carried state."""

import json
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http
from tritonclient.utils import InferenceServerException

from export import parity
from export.source import Source
from export.verify import main as verify
from runtimes.pipeline import open_pipeline
from runtimes.predict import main as predict
from runtimes.repository import find
from runtimes.runtime import open_runtime
from runtimes.triton.server import TritonServer
from tests.exported import Exports
from training.checkpoint import Checkpoint
from training.spec import all_specs, find_spec

pytestmark = pytest.mark.slow
POLICIES = [name for name in sorted(all_specs()) if name.startswith("policy_")]


@pytest.fixture(scope="module")
def repository(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with every policy, as a user's export leaves it."""
    return exports.onnx(tmp_path_factory.mktemp("policies") / "model_repository", *POLICIES)


# One model over HTTP is enough: the protocol does not depend on it.
@pytest.mark.parametrize(("model", "protocol"), [*((model, "grpc") for model in POLICIES), (POLICIES[0], "http")])
def test_parity_holds_through_the_server(
    model: str, protocol: str, server: TritonServer, repository: Path, checkpoints: Path
) -> None:
    source = Source(find_spec(model), Checkpoint.load(checkpoints / model))
    root = find(repository, f"{model}_onnx")
    url = server.grpc_url if protocol == "grpc" else server.http_url
    with open_runtime(root, engine="triton", url=url, protocol=protocol) as runtime:
        checks = parity.check_parity(runtime, source, "fp32")
    parity.require_passed(checks)
    assert any(name.startswith("rollout_") for name in checks)


def test_the_ensemble_answers_as_the_pipeline_in_process(server: TritonServer, repository: Path) -> None:
    root = find(repository, "policy_mamba_onnx")
    with open_runtime(root) as runtime:
        pipeline = open_pipeline(runtime.artifact, root)
        request = pipeline.example()
        want = pipeline.decode(runtime.fresh(pipeline.encode([request])))[0]
    got = ask(server, "policy_mamba", json.dumps(request))
    assert got["buttons"] == want["buttons"]
    assert got["main_stick"] == want["main_stick"]
    np.testing.assert_allclose(got["probabilities"]["main_x"], want["probabilities"]["main_x"], atol=1e-6)


def wrong_requests() -> list[tuple[str, str]]:
    return [
        ("not json", "JSON"),
        ("{}", "frames"),
        (json.dumps({"frames": [[0.0] * 286]}), "287"),
        (json.dumps({"frames": [["x"] * 287]}), "number"),
        ('{"frames": [[' + ", ".join(["NaN"] * 287) + "]]}", "found nan"),
        (json.dumps({"frames": [[0.0] * 287] * 513}), "512"),
    ]


@pytest.mark.parametrize(("request_text", "named"), wrong_requests())
def test_a_wrong_request_is_refused_by_name_and_the_next_one_answered(
    request_text: str, named: str, server: TritonServer
) -> None:
    with pytest.raises(InferenceServerException, match=f"(?i){named}") as caught:
        ask(server, "policy_gru", request_text)
    assert "\n" not in caught.value.message()
    assert ask(server, "policy_gru", json.dumps({"frames": [[0.0] * 287]}))["buttons"]


def test_predict_says_the_same_through_the_server(
    server: TritonServer, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--repository", str(repository)]
    assert predict(["policy_lstm", "--example", *place]) == 0
    request = tmp_path / "request.json"
    request.write_text(capsys.readouterr().out)
    answers = []
    for more in ([], ["--url", server.grpc_url], ["--url", server.grpc_url, "--target", "onnx"]):
        assert predict(["policy_lstm", "--input", str(request), *place, *more]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nonsense", "--example"], "python -m export.all nonsense --target onnx"),
        (["policy_gru", "--target", "nonsense", "--example"], "policy_gru_onnx"),
        (["policy_gru"], "--input"),
        (["policy_gru", "--input", "missing.json"], "missing.json"),
        (["policy_gru", "--input", "request.json", "--device", "tpu"], "cpu"),
        (["policy_gru", "--input", "request.json", "--url", "127.0.0.1:1"], "127.0.0.1:1"),
    ],
)
def test_predict_refuses_in_one_line(
    arguments: list[str],
    named: str,
    repository: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = ["--repository", str(repository)]
    assert predict(["policy_gru", "--example", *place]) == 0
    (tmp_path / "request.json").write_text(capsys.readouterr().out)
    monkeypatch.chdir(tmp_path)
    assert predict([*arguments, *place]) in (1, 2)
    printed = capsys.readouterr().err
    assert named in printed
    assert printed.count("\n") == 1


def test_a_published_repository_verifies_and_a_changed_byte_does_not(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(["--repository", str(repository)]) == 0
    model = find(repository, "policy_gru_onnx") / "model.onnx"
    whole = model.read_bytes()
    try:
        model.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert verify(["--repository", str(repository), "--json"]) == 1
    finally:
        model.write_bytes(whole)
    assert "policy_gru_onnx" in capsys.readouterr().out


def ask(server: TritonServer, model: str, text: str) -> dict[str, object]:
    """The answer of an ensemble to one request that is a whole sequence."""
    client = tritonclient.http.InferenceServerClient(server.http_url)
    given = tritonclient.http.InferInput("request", [1, 1], "BYTES")
    given.set_data_from_numpy(np.array([[text.encode()]], dtype=np.object_))
    sequence = {"sequence_id": np.random.default_rng().integers(1, 2**31).item(), "sequence_start": True}
    try:
        result = client.infer(model, [given], sequence_end=True, **sequence)
    finally:
        client.close()
    return json.loads(result.as_numpy("answer")[0, 0])

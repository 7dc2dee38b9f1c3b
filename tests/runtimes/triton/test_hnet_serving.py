"""H-Net in every runtime: a text is scored and segmented, another is continued, and a wrong one is refused."""

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from export.triton.lint import lint
from export.triton.repository import reschedule
from export.triton.scheduling import Scheduling
from runtimes.artifact import Artifact
from runtimes.errors import InputError, Overloaded, SlipwayError
from runtimes.generate import main as generate_command
from runtimes.pipeline import open_pipeline
from runtimes.pipelines.hnet.generation import EXAMPLE, ContinuousBatcher, Writing, read_generation_request, write
from runtimes.predict import main as predict
from runtimes.repository import find
from runtimes.runtime import open_runtime
from runtimes.triton.client import CLIENTS
from runtimes.triton.server import TritonServer
from tests import toys
from tests.exported import Exports

TEXT = "తెలుగు ఒక భాష. 😀 ok"


@pytest.fixture(scope="module")
def repository(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the untrained H-Net, whole and as a step."""
    return exports.onnx(tmp_path_factory.mktemp("hnet") / "model_repository", "hnet", "hnet_step")


@pytest.fixture(scope="module")
def runtime(repository: Path) -> Iterator[Any]:
    with open_runtime(find(repository, "hnet_step_onnx")) as runtime:
        yield runtime


def request(**changes: Any) -> Any:
    return read_generation_request({**EXAMPLE, **changes}, "request")


def written(pieces: Any) -> str:
    return "".join(piece["text"] for piece in pieces)


# Scores and segments


def test_an_answer_scores_every_byte_and_its_segments_are_the_text(repository: Path) -> None:
    root = find(repository, "hnet_onnx")
    with open_runtime(root) as runtime:
        pipeline = open_pipeline(runtime.artifact, root)
        inputs = pipeline.encode([{"text": TEXT}, {"bytes": list(b"ab")}, {"text": "x"}])
        outputs = runtime.fresh(inputs)
    answers = pipeline.decode(outputs)
    for row, text in enumerate([TEXT.encode(), b"ab", b"x"]):
        answer, logits = answers[row], outputs["logits"][row].astype(np.float64)
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        bits = [-np.log2(shares[place, byte]) for place, byte in enumerate(text)]
        np.testing.assert_allclose(answer["bits"], bits, rtol=1e-4)
        assert answer["bits_per_byte"] == pytest.approx(np.mean(bits), rel=1e-4)
        (parts,) = answer["segments"]
        assert [part["begin"] for part in parts][1:] == [part["end"] for part in parts][:-1]
        assert (parts[0]["begin"], parts[-1]["end"]) == (0, len(text))
        begins = {0, *np.flatnonzero(outputs["boundary"][row, 1 : len(text) + 1, 0]).tolist()}
        assert {part["begin"] for part in parts} == begins
        assert sum(part["bits"] for part in parts) == pytest.approx(sum(bits), rel=1e-4)
        for part in parts:
            assert part["code_point"] == len(text[: part["begin"]].decode(errors="ignore")) + (
                (text[part["begin"]] & 0xC0) == 0x80
            )


def test_a_segment_starts_at_its_boundary_and_not_one_byte_later(repository: Path) -> None:
    root = find(repository, "hnet_onnx")
    with open_runtime(root) as runtime:
        pipeline = open_pipeline(runtime.artifact, root)
        outputs = runtime.fresh(pipeline.encode([{"text": "abcdef"}]))
    outputs["boundary"][0, :, 0] = [True, False, False, True, False, False, False]  # the third byte: "c"
    parts = pipeline.decode(outputs)[0]["segments"][0]
    assert [(part["text"], part["begin"], part["end"], part["code_point"]) for part in parts] == [
        ("ab", 0, 2, 0),
        ("cdef", 2, 6, 2),
    ]


WRONG = [
    ('{"text": ""}', "found an empty text"),
    (json.dumps({"bytes": list("తె".encode())[:-1]}), "ends inside a code point"),
    (json.dumps({"bytes": [97, 256]}), "0 to 255, found 256 at 1"),
    (json.dumps({"text": "a" * 1_000_000}), "1 to 1,023 bytes, found 1,000,000 bytes; send it in pieces"),
    ('{"text": "\\ud800"}', "surrogate"),
    ('{"tokens": [1]}', "expected {"),
]


@pytest.mark.parametrize(("request_text", "named"), WRONG)
def test_a_wrong_text_is_refused_in_one_line(
    request_text: str, named: str, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "request.json"
    path.write_text(request_text)
    assert predict(["hnet", "--input", str(path), "--repository", str(repository)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert named in printed.err
    assert printed.err.count("\n") == 1


def test_the_step_runs_what_lies_inside_in_an_if_and_skips_it(repository: Path) -> None:
    graph = onnx.load(find(repository, "hnet_step_onnx") / "model.onnx").graph
    (node,) = [node for node in graph.node if node.op_type == "If"]
    kinds = {attribute.name: {inner.op_type for inner in attribute.g.node} for attribute in node.attribute}
    assert {"Gemm", "MatMul"} & kinds["then_branch"]
    assert not {"Gemm", "MatMul", "Where"} & kinds["else_branch"]


# Writing


def test_what_is_written_is_whole_characters_of_at_most_so_many_bytes(runtime: Any) -> None:
    for seed in range(4):
        pieces = list(write(runtime, request(temperature=5.0, max_bytes=61, seed=seed)))
        assert all(len(piece["text"]) <= 1 for piece in pieces)
        assert 0 < len(written(pieces).encode()) <= 61
        reasons = [piece.get("finish_reason") for piece in pieces]
        assert reasons[:-1] == [None] * (len(pieces) - 1)
        assert reasons[-1] in ("stop", "length")


def test_a_text_may_begin_with_nothing(runtime: Any) -> None:
    assert written(write(runtime, request(text="", max_bytes=9)))


def test_a_seed_writes_one_text_and_another_seed_another(runtime: Any) -> None:
    first, again, other = (written(write(runtime, request(seed=seed))) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_texts_that_begin_at_different_times_do_not_meet(runtime: Any) -> None:
    """Three texts, each begun some steps after the one before, are what each is alone."""
    drafts = [request(seed=seed, text=text, max_bytes=40) for seed, text in enumerate(["ab", "తెలుగు భాష", "x"])]
    batcher, printed = ContinuousBatcher(runtime), {}
    waiting = [Writing(each) for each in drafts]
    for writing in waiting:
        printed[writing] = ""
        batcher.add(writing)
        for _ in range(7):
            for each, text in batcher.step():
                printed[each] += text
    while batcher.writings:
        for each, text in batcher.step():
            printed[each] += text
    assert list(printed.values()) == [written(write(runtime, each)) for each in drafts]


def test_no_more_texts_are_written_at_once_than_the_model_is_proved_for(runtime: Any) -> None:
    batcher = ContinuousBatcher(runtime)
    for _ in range(16):
        batcher.add(Writing(request()))
    with pytest.raises(InputError, match="at most 16 texts"):
        batcher.add(Writing(request()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": "a" * 5000}, "0 to 4,096 bytes, found 5,000"),
        ({"text": "\ud800"}, "surrogate"),
        ({"text": None}, "expected {"),
        ({"max_bytes": 0}, "max_bytes: expected a whole number from 1 to 4096, found 0"),
        ({"max_bytes": True}, "max_bytes: expected a whole number"),
        ({"temperature": float("nan")}, "temperature: expected a number from 0 to 100, found nan"),
        ({"top_k": -1}, "top_k: expected a whole number"),
        ({"seed": 1.5}, "seed: expected a whole number"),
        ({"stop": "x"}, "expected fields text, max_bytes, .*; found 'stop'"),
    ],
)
def test_a_wrong_request_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        request(**change)


def test_a_text_is_written_from_the_command_line(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["hnet", "--text", "తెలు", "--max-bytes", "30", "--seed", "3", "--repository", str(repository)]
    assert generate_command(arguments) == 0
    plain = capsys.readouterr().out
    assert generate_command([*arguments, "--json"]) == 0
    pieces = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert plain == written(pieces) + "\n"
    assert generate_command(["hnet", "--repository", str(repository)]) == 2
    assert "expected --text" in capsys.readouterr().err


# The repository


def test_the_linter_knows_the_model_that_writes(repository: Path, tmp_path: Path) -> None:
    assert lint(repository) == []
    config = repository / "hnet_generate" / "config.pbtxt"
    right = config.read_text()
    try:
        config.write_text(right.replace("decoupled: true", "decoupled: false"))
        assert lint(repository) == [
            "hnet_generate: expected a decoupled model_transaction_policy, found none; one request has many answers"
        ]
    finally:
        config.write_text(right)


# A real Triton


@pytest.fixture
def client(server: TritonServer) -> Iterator[Any]:
    with closing(CLIENTS["grpc"](server.grpc_url, 30)) as client:
        yield client


def ask(client: Any, **changes: Any) -> Iterator[dict[str, str]]:
    request = json.dumps({**EXAMPLE, **changes}).encode()
    for response in client.stream("hnet_generate", {"request": np.array([request], np.object_)}):
        yield json.loads(response["answer"].item())


@pytest.mark.slow
class TestServer:
    pytestmark = toys.needs_server()

    def test_the_ensemble_has_the_bytes_of_predict(
        self, server: TritonServer, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "request.json"
        path.write_text(json.dumps({"text": TEXT}))
        assert predict(["hnet", "--input", str(path), "--repository", str(repository)]) == 0
        here = capsys.readouterr().out
        assert predict(["hnet", "--input", str(path), "--url", server.grpc_url]) == 0
        assert capsys.readouterr().out == here

    @pytest.mark.parametrize(("request_text", "named"), WRONG)
    def test_a_wrong_text_is_refused_and_the_next_answered(
        self, request_text: str, named: str, server: TritonServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "request.json"
        path.write_text(request_text)
        assert predict(["hnet", "--input", str(path), "--url", server.grpc_url]) == 2
        assert named in capsys.readouterr().err

    def test_a_server_writes_what_this_process_writes(self, client: Any, runtime: Any) -> None:
        for seed in range(2):
            assert written(ask(client, seed=seed)) == written(write(runtime, request(seed=seed)))

    def test_the_command_line_streams_from_a_server(
        self, server: TritonServer, repository: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["hnet", "--text", "తె", "--max-bytes", "24"]
        assert generate_command([*arguments, "--repository", str(repository)]) == 0
        here = capsys.readouterr().out
        assert generate_command([*arguments, "--url", server.grpc_url]) == 0
        assert capsys.readouterr().out == here

    def test_texts_of_several_clients_are_written_at_once(self, server: TritonServer, runtime: Any) -> None:
        """More clients than places, each with its own text."""
        got: dict[int, str] = {}

        def one(seed: int) -> None:
            with closing(CLIENTS["grpc"](server.grpc_url, 60)) as own:
                got[seed] = written(ask(own, seed=seed, max_bytes=30))

        threads = [threading.Thread(target=one, args=(seed,)) for seed in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got[3] == written(write(runtime, request(seed=3, max_bytes=30)))
        assert sorted(got) == list(range(20))

    @pytest.mark.parametrize(
        ("change", "message"), [({"text": "a" * 5000}, "0 to 4,096"), ({"max_bytes": 5000}, "max_bytes")]
    )
    def test_a_wrong_request_is_refused_by_the_server(self, client: Any, change: dict[str, Any], message: str) -> None:
        with pytest.raises(SlipwayError, match=message):  # Triton 2.51 gives no status with an error in a stream
            list(ask(client, **change))
        assert written(ask(client, max_bytes=3))

    def test_a_client_that_goes_ends_its_text(self, server: TritonServer) -> None:
        """Sixteen long texts leave no room for another; once their clients have gone, it is written."""
        with ExitStack() as stack:
            texts = []
            for _ in range(16):
                own = stack.enter_context(closing(CLIENTS["grpc"](server.grpc_url, 30)))
                texts.append(stack.enter_context(closing(ask(own, max_bytes=4096, temperature=0))))
                next(texts[-1])
            answered = threading.Event()

            def late() -> None:
                with closing(CLIENTS["grpc"](server.grpc_url, 60)) as own:
                    assert written(ask(own, max_bytes=3))
                answered.set()

            thread = threading.Thread(target=late)
            thread.start()
            for text in texts:
                assert "finish_reason" not in next(text)
            assert not answered.is_set()
        assert answered.wait(15)
        thread.join()

    def test_too_many_texts_are_refused_at_once_and_those_that_wait_too_long_later(
        self, repository: Path, tmp_path: Path
    ) -> None:
        limited = tmp_path / "model_repository"
        shutil.copytree(repository, limited)
        queue = Scheduling(instances=2, queue=3, timeout_ms=3000)
        reschedule(Artifact.load(find(limited, "hnet_step_onnx")), limited, queue)
        with TritonServer(limited, models=["hnet_generate"]) as server, ExitStack() as stack:
            texts = []
            for _ in range(16):
                own = stack.enter_context(closing(CLIENTS["grpc"](server.grpc_url, 30)))
                texts.append(stack.enter_context(closing(ask(own, max_bytes=4096, temperature=0))))
                next(texts[-1])

            def one_more(_: int) -> str:
                with closing(CLIENTS["grpc"](server.grpc_url, 30)) as own, pytest.raises(Overloaded) as refused:
                    list(ask(own, max_bytes=3))
                return str(refused.value)

            with ThreadPoolExecutor(5) as pool:
                told = list(pool.map(one_more, range(5)))
            assert sum("maximum queue size" in each for each in told) == 2
            assert sum("timeout expired" in each for each in told) == 3
            texts.pop().close()
            assert written(ask(own, max_bytes=3))

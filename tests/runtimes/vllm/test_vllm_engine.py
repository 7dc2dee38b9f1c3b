"""A real vLLM agrees with transformers on the same weights, restarts after a crash, and leaves no process or file."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtimes.artifact import Artifact, write_json
from runtimes.engines.vllm import VllmRuntime, refuse_fallback
from runtimes.errors import ArtifactError, EngineError, InputError, MissingPackage
from runtimes.runtime import open_runtime
from runtimes.vllm.artifact import CHECKPOINT, ENGINE_FILE, NEXT_IDS, TOKEN_LOGPROBS
from runtimes.vllm.process import VllmModel
from runtimes.vllm.server import Reported, VllmServer, find_python
from tests import small_decoders, toys

ROOT = Path(__file__).parents[3]
GREEDY = {"max_tokens": 12, "temperature": 0}
starts_vllm = [pytest.mark.vllm, pytest.mark.slow]

Generator = tuple[VllmRuntime, Any]
Embedder = tuple[VllmRuntime, small_decoders.Embedder]


def expected_scores(module: Any, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logprob of each token given those before it, and the likeliest next one, by a loop over transformers' logits."""
    with torch.inference_mode():
        logprobs = module(torch.tensor(ids)[None]).logits.log_softmax(-1)[0].numpy()
    own = [0.0] + [logprobs[place - 1, token] for place, token in enumerate(ids) if place > 0]
    return np.array(own, np.float32), logprobs.argmax(-1)


class TestGenerator:
    pytestmark = starts_vllm

    @pytest.mark.parametrize("lengths", [[1], [5, 9], [32, 5, 1, 7, 2, 32, 3, 4]])
    def test_scores_are_those_of_transformers_row_by_row(self, vllm_generator: Generator, lengths: list[int]) -> None:
        runtime, module = vllm_generator
        inputs = small_decoders.row_inputs(lengths)
        outputs = runtime.run(inputs)
        for row, mask in enumerate(inputs["attention_mask"].astype(bool)):
            logprobs, next_ids = expected_scores(module, inputs["input_ids"][row, mask])
            np.testing.assert_allclose(outputs[TOKEN_LOGPROBS][row, mask], logprobs, atol=1e-4)
            np.testing.assert_array_equal(outputs[NEXT_IDS][row, mask], next_ids)
            assert not outputs[TOKEN_LOGPROBS][row, ~mask].any()

    def test_a_row_of_padding_is_refused(self, vllm_generator: Generator) -> None:
        inputs = small_decoders.row_inputs([3, 4])
        inputs["attention_mask"][0] = 0
        with pytest.raises(InputError, match="found a row of padding"):
            vllm_generator[0].run(inputs)

    def test_it_says_what_runs(self, vllm_generator: Generator) -> None:
        version, *rest = vllm_generator[0].provider.removeprefix("vllm ").split()
        assert version[0].isdigit()
        assert rest == ["cpu", "float32", "quantization=none"]

    def test_greedy_completions_are_those_of_transformers(self, vllm_generator: Generator) -> None:
        runtime, module = vllm_generator
        prompts = [[5, 6, 7, 8], [301, 17]]
        for prompt, completion in zip(prompts, runtime.complete(prompts, logprobs=0, **GREEDY), strict=True):
            whole = module.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)[0].numpy()
            assert completion.token_ids == tuple(whole[len(prompt) :])
            assert completion.finish_reason == "length"
            assert completion.prompt_tokens == len(prompt)
            logprobs, _ = expected_scores(module, whole)
            np.testing.assert_allclose(completion.logprobs, logprobs[len(prompt) :], atol=1e-4)

    def test_a_stream_says_the_same_in_pieces(self, vllm_generator: Generator) -> None:
        runtime, _ = vllm_generator
        (whole,) = runtime.complete([small_decoders.TEXTS[0]], **GREEDY)
        pieces = list(runtime.complete_stream(small_decoders.TEXTS[0], **GREEDY))
        assert len(pieces) > 1
        assert tuple(token for piece in pieces for token in piece.token_ids) == whole.token_ids
        assert "".join(piece.text for piece in pieces) == whole.text.rstrip("\ufffd")
        assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]

    def test_a_stream_that_is_left_ends_its_request(self, vllm_generator: Generator) -> None:
        runtime, _ = vllm_generator
        stream = runtime.complete_stream([7] * 8, max_tokens=50, ignore_eos=True)
        next(stream)
        stream.close()
        toys.wait_for(lambda: runtime.metrics()["vllm:num_requests_running"] == 0)

    def test_finished_requests_are_counted(self, vllm_generator: Generator) -> None:
        runtime, _ = vllm_generator
        before = runtime.metrics()["vllm:generation_tokens_total"]
        runtime.complete([[5, 6]], **GREEDY)
        toys.wait_for(lambda: runtime.metrics()["vllm:generation_tokens_total"] == before + 12)

    def test_what_vllm_refuses_is_one_line(self, vllm_generator: Generator) -> None:
        runtime, _ = vllm_generator
        with pytest.raises(InputError, match=r"vLLM refuses the request: .*context length is 64 tokens"):
            runtime.complete([[5] * 80])
        with pytest.raises(InputError, match="expected a model that embeds, found one of task generate"):
            runtime.embed(["text"])
        with pytest.raises(InputError, match="all texts or all token ids, found both"):
            runtime.complete(["text", [5]])

    def test_a_server_that_dies_under_a_request_fails_it_and_the_next_one_works(
        self, vllm_generator: Generator
    ) -> None:
        runtime, _ = vllm_generator
        before = runtime.run(small_decoders.row_inputs([5, 9]))
        (engine,) = (pid for pid, title in descendants(runtime.model.pid) if "EngineCore" in title)
        os.kill(engine, signal.SIGSTOP)  # so that the request is under way when it dies
        with ThreadPoolExecutor(1) as pool:
            request = pool.submit(runtime.complete, [[5, 6, 7]], **GREEDY)
            os.kill(engine, signal.SIGKILL)
            with pytest.raises(EngineError, match=r"vLLM died under the request .*; its log ends: \S+") as failed:
                request.result(60)
        assert "\n" not in str(failed.value)
        after = runtime.run(small_decoders.row_inputs([5, 9]))
        assert all(np.array_equal(after[name], before[name]) for name in before)


class TestEmbedder:
    pytestmark = starts_vllm

    @pytest.mark.parametrize("lengths", [[1], [32, 5, 1, 7, 2, 32, 3, 4]])
    def test_vectors_are_those_of_torch(self, vllm_embedder: Embedder, lengths: list[int]) -> None:
        runtime, module = vllm_embedder
        inputs = small_decoders.row_inputs(lengths)
        vectors = runtime.run(inputs)["vector"]
        pairs = zip(inputs["input_ids"], inputs["attention_mask"].astype(bool), strict=True)
        np.testing.assert_allclose(vectors, [module.vector(ids[mask]) for ids, mask in pairs], atol=1e-5)

    def test_a_text_is_embedded_as_its_tokens_are(self, vllm_embedder: Embedder) -> None:
        runtime, module = vllm_embedder
        tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(str(runtime.root / "assets/tokenizer.json"))
        ids = [encoding.ids for encoding in tokenizer.encode_batch(small_decoders.TEXTS)]
        # Not to the last bit: vLLM makes its batches of what has arrived by then.
        np.testing.assert_allclose(runtime.embed(small_decoders.TEXTS), runtime.embed(ids), atol=1e-6)
        np.testing.assert_allclose(runtime.embed(ids), [module.vector(row) for row in ids], atol=1e-5)

    def test_it_does_not_generate(self, vllm_embedder: Embedder) -> None:
        with pytest.raises(InputError, match="expected a model that generates, found one of task embed"):
            vllm_embedder[0].complete(["text"])


PARENT = """
import pathlib, sys
sys.path.insert(0, {root!r})
from runtimes.runtime import open_runtime
open_runtime({folder!r}, log=pathlib.Path({log!r})).open()
"""


@pytest.mark.vllm
@pytest.mark.slow
def test_nothing_is_left_of_a_server_whose_parent_was_killed(tmp_path: Path) -> None:
    small_decoders.make_generator(tmp_path / "generator")
    small_decoders.opened(tmp_path / "generator")  # skips
    program = PARENT.format(root=str(ROOT), folder=str(tmp_path / "generator"), log=str(tmp_path / "log"))
    with subprocess.Popen([sys.executable, "-c", program]) as parent:
        toys.wait_for(lambda: any("EngineCore" in title for _, title in descendants(parent.pid)), 100)
        family = [pid for pid, _ in descendants(parent.pid)]
        assert len(family) >= 3  # guard, server, engine
        parent.kill()
    toys.wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family), 30)


@pytest.mark.vllm
@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    small_decoders.make_generator(tmp_path)
    small_decoders.opened(tmp_path)  # skips
    (tmp_path / CHECKPOINT / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(EngineError, match=r"expected vLLM to start on .*checkpoint, found: .*(safetensor|header)"):
        open_runtime(tmp_path, verify=False).open()


def descendants(pid: int) -> list[tuple[int, str]]:
    """(pid, title) of every process below `pid`."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, _, rest = status.read_text().partition(" (")
            title, _, fields = rest.rpartition(") ")
            command = (status.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has just ended
            continue
        parents[int(number)] = (int(fields.split()[1]), f"{title} {command}")
    return list(below(pid, parents))


def below(pid: int, parents: dict[int, tuple[int, str]]) -> Iterator[tuple[int, str]]:
    for child, (parent, title) in parents.items():
        if parent == pid:
            yield child, title
            yield from below(child, parents)


@pytest.fixture
def empty_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment with a package `vllm` that has no server."""
    venv = tmp_path / "venv"
    (venv / "lib" / "python3.11" / "site-packages" / "vllm").mkdir(parents=True)
    (venv / "lib" / "python3.11" / "site-packages" / "vllm" / "__init__.py").touch()
    (venv / "bin").mkdir()
    (venv / "bin" / "python3").symlink_to(sys.executable)
    monkeypatch.setenv("SLIPWAY_VLLM_VENV", str(venv))
    return venv


def test_no_vllm_is_an_error_that_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPWAY_VLLM_VENV", str(tmp_path))
    with pytest.raises(MissingPackage, match=f"expected vLLM in {tmp_path} .*, found none; run: make vllm"):
        find_python()


def test_a_taken_port_is_an_error_before_anything_starts(empty_environment: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = VllmServer({"model": "nowhere"}, port=port)
        with pytest.raises(InputError, match=f"expected a free port at 127.0.0.1:{port}, found .*in use"):
            server.__enter__()
    assert not server.running


def test_a_server_that_does_not_start_is_an_error_with_its_reason(empty_environment: Path) -> None:
    with pytest.raises(EngineError, match=r"expected vLLM to start on nowhere, found: .*vllm\.entrypoints"):
        VllmServer({"model": "nowhere"}).__enter__()


def test_a_server_that_takes_too_long_is_stopped(empty_environment: Path) -> None:
    server = VllmServer({"model": "nowhere"}, start_timeout_s=0)
    with pytest.raises(EngineError, match="expected vLLM to be ready within 0 s on nowhere"):
        server.__enter__()
    assert not server.running


def test_a_closed_model_answers_nothing() -> None:
    with pytest.raises(EngineError, match="nowhere: expected an open model, found a closed one"):
        VllmModel({"model": "nowhere"}).complete(["text"])


@pytest.mark.parametrize(
    ("engine", "quantization", "message"),
    [
        ({"dtype": "auto"}, None, "expected a dtype, found auto: vLLM would run float32 weights in bfloat16"),
        ({"dtype": "float32"}, {"format": "pack-quantized"}, "expected dtype bfloat16 or float16 for packed weights"),
        ({"max_model_len": 32}, None, "expected max_model_len of 33 or more, found 32"),
    ],
)
def test_what_vllm_would_refuse_late_is_refused_early(
    tmp_path: Path, engine: dict[str, Any], quantization: object, message: str
) -> None:
    small_decoders.make_generator(tmp_path, **engine)
    config = json.loads((tmp_path / CHECKPOINT / "config.json").read_text())
    write_json(tmp_path / CHECKPOINT / "config.json", {**config, "quantization_config": quantization})
    with pytest.raises((ArtifactError, EngineError), match=message):
        open_runtime(tmp_path, verify=False).open()


def test_arguments_that_are_none_are_refused(tmp_path: Path) -> None:
    small_decoders.make_generator(tmp_path)
    (tmp_path / ENGINE_FILE).write_text("[]")
    with pytest.raises(ArtifactError, match=r"model\.json: expected an object with a 'model', found none"):
        open_runtime(tmp_path, verify=False).open()


def test_a_manifest_without_a_task_is_refused(tmp_path: Path) -> None:
    small_decoders.make_generator(tmp_path)
    artifact = Artifact.load(tmp_path)
    fields = {name: getattr(artifact, name) for name in Artifact.__dataclass_fields__}
    shutil.rmtree(tmp_path / CHECKPOINT)
    with pytest.raises(ArtifactError, match="expected a task of generate, embed, found None"):
        VllmRuntime(tmp_path, Artifact(**{**fields, "built_with": {}}))


@pytest.mark.parametrize(
    ("what", "wanted"), [("device", "cuda"), ("dtype", "bfloat16"), ("quantization", "compressed-tensors")]
)
def test_what_runs_as_something_else_is_refused(what: str, wanted: str) -> None:
    reported = Reported(version="0.32.0", device="cpu", dtype="float32", quantization="none")
    refuse_fallback("toy", {"device": "cpu", "dtype": "auto", "quantization": "none"}, reported)
    with pytest.raises(EngineError, match=f"vllm on toy: expected {what} {wanted}, it runs "):
        refuse_fallback("toy", {what: wanted}, reported)

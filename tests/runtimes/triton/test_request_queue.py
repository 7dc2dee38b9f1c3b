"""A model with its own queue refuses requests beyond its limits at once, with a message that a client reads as busy."""

import importlib.util
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import runtimes
from runtimes.errors import Overloaded
from runtimes.triton.client import BUSY
from runtimes.triton.request_queue import Limits, RequestQueue
from tests import toys


def config(**parameters: int) -> dict[str, Any]:
    return {"parameters": {name: {"string_value": str(value)} for name, value in parameters.items()}}


def test_the_limits_are_those_of_the_config_or_the_stated_default() -> None:
    assert Limits.of({}) == Limits.of(config()) == Limits(size=64, timeout_s=0)
    assert Limits.of(config(max_queue_size=3, queue_timeout_ms=250)) == Limits(size=3, timeout_s=0.25)


def test_first_come_first_served_and_no_more_than_fit() -> None:
    line: RequestQueue[int] = RequestQueue(Limits(size=2))
    for one in (1, 2):
        line.put(one)
    with pytest.raises(Overloaded, match=BUSY[0]):
        line.put(3)
    line.put(3, free=1)  # there is a place for one of the three
    assert [line.get() for _ in range(4)] == [1, 2, 3, None]
    assert line.overdue() == []


def test_who_has_waited_too_long_waits_no_more() -> None:
    line: RequestQueue[int] = RequestQueue(Limits(timeout_s=0.05))
    line.put(1)
    assert line.overdue() == []
    time.sleep(0.06)
    line.put(2)
    assert line.overdue() == [1]
    assert line.get() == 2
    assert BUSY[1] in str(line.limits.too_late())


def test_who_waits_for_the_next_is_woken_by_it_and_by_the_end() -> None:
    line: RequestQueue[int] = RequestQueue(Limits())
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(lambda: [line.get(block=True), line.get(block=True)])
        time.sleep(0.05)
        line.put(1)
        line.close()
        assert taken.result(timeout=10) == [1, None]


class Sender:
    """Keeps what the backend answers."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.final = False

    def send(self, response: Any = None, flags: int = 0) -> None:
        self.answers += [response] if response else []
        self.final = self.final or bool(flags)

    def is_cancelled(self) -> bool:
        return False


def request(sender: Sender) -> Any:
    text = SimpleNamespace(name=lambda: "text_input", as_numpy=lambda: np.array([b"hello"], np.object_))
    return SimpleNamespace(inputs=lambda: [text], get_response_sender=lambda: sender)


@pytest.fixture
def vllm_backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program of the backend, which Triton's process alone can import whole."""
    triton = ModuleType("triton_python_backend_utils")
    triton.__dict__.update(
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
        InferenceResponse=lambda tensors=(), error=None: error or dict(tensors),
        Tensor=lambda *named: named,
        TritonError=type("TritonError", (), {"UNAVAILABLE": 14, "INTERNAL": 13, "INVALID_ARG": 3}),
        Logger=SimpleNamespace(log_info=print, log_error=print),
        using_decoupled_model_transaction_policy=lambda _: True,
    )
    triton.TritonError.__init__ = lambda self, text, code: self.__dict__.update(text=text, code=code)
    monkeypatch.setitem(sys.modules, triton.__name__, triton)
    path = Path(runtimes.__file__).parent / "triton" / "backends" / "vllm" / "model.py"
    spec = importlib.util.spec_from_file_location("vllm_backend", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_writer_whose_thread_fails_ends_its_process() -> None:
    """Else it would look ready and answer nobody."""
    path = Path(runtimes.__file__).parent / "triton" / "steps" / "write.py"
    code = (
        "import runpy, sys, threading, types\n"
        "triton = types.SimpleNamespace(TRITONSERVER_RESPONSE_COMPLETE_FINAL=1)\n"
        "sys.modules['triton_python_backend_utils'] = triton\n"
        f"runpy.run_path({str(path)!r})\n"
        "thread = threading.Thread(target=lambda: {}['tokens'])\n"
        "thread.start(); thread.join(); print('alive')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "KeyError: 'tokens'" in ended.stderr


def test_vllm_is_asked_so_much_at_once_so_many_wait_and_the_rest_is_refused(
    vllm_backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    class Busy:
        """In place of vLLM: answers once it may."""

        def open(self) -> str:
            return "no engine"

        def close(self) -> None:
            pass

        def complete(self, prompts: list[str], **_: Any) -> list[Any]:
            go_on.wait(30)
            return [SimpleNamespace(text=" world") for _ in prompts]

    monkeypatch.setattr(vllm_backend, "VllmModel", lambda *_, **__: Busy())
    monkeypatch.setattr(vllm_backend, "engine_arguments", lambda _: {})
    monkeypatch.setattr(vllm_backend, "REQUESTS", 2)
    served = vllm_backend.TritonPythonModel()
    named = {"output": [], **config(max_queue_size=3)}
    served.initialize(
        {"model_config": json.dumps(named), "model_repository": "", "model_version": "1", "model_name": "m"}
    )
    senders = [Sender() for _ in range(7)]
    served.execute([request(sender) for sender in senders])
    refused = [sender for sender in senders if sender.final]
    assert refused == senders[5:]
    for sender in refused:
        (error,) = sender.answers
        assert error.code == 14
        assert BUSY[0] in error.text
    go_on.set()
    toys.wait_for(lambda: all(sender.final for sender in senders))
    assert all(sender.answers[0]["text_output"] == [b"hello world"] for sender in senders[:5])
    last = Sender()
    served.execute([request(last)])  # there is room again
    served.finalize()
    assert last.answers
    assert last.final

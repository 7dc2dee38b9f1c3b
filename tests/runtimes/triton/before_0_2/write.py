"""A byte language model that writes, in Triton's Python backend: a JSON request in, pieces of text out as they come.

Export copies this file, as model.py, beside the manifest and all files of the artifact of one step. The texts of all
clients are written together: one step of the model reads a byte of each. A client that has gone ends its text.
"""

import json
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

# Triton's embedded interpreter ignores PYTHONPATH. The path is left again at once: what else lies on it, such as
# another numpy, is not for this environment.
if source := os.environ.get("SLIPWAY_PATH"):
    sys.path.insert(0, source)
    import runtimes  # noqa: F401

    sys.path.remove(source)

from runtimes.base import open_runtime
from runtimes.waiting_line import Limits, WaitingLine
from runtimes.writing import Desk, Writing, piece, read_wish

from runtimes.errors import SlipwayError
from runtimes.pipeline import parse_request, write_answer

DEVICES = {"CPU": "cpu", "GPU": "cuda"}
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


def end_process(failure: threading.ExceptHookArgs) -> None:
    """A thread that fails takes the process along: Triton tells those who wait, and serve has it loaded again."""
    traceback.print_exception(failure.exc_type, failure.exc_value, failure.exc_traceback)
    os._exit(1)


threading.excepthook = end_process


class TritonPythonModel:
    """One instance: a thread that writes, and those who wait for it."""

    def initialize(self, args: dict[str, str]) -> None:
        folder = Path(args["model_repository"], args["model_version"])
        try:
            self.runtime = open_runtime(folder, device=DEVICES[args["model_instance_kind"]])
            self.runtime.open()
        except SlipwayError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        self.desk = Desk(self.runtime)
        self.senders: dict[Writing, Any] = {}
        self.line: WaitingLine[tuple[Writing, Any]] = WaitingLine(Limits.of(json.loads(args["model_config"])))
        self.thread = threading.Thread(target=self._write, daemon=True)
        self.thread.start()

    def execute(self, requests: list[Any]) -> None:
        """Nothing yet: what is right waits for the thread that writes; what is wrong, or too much, is refused alone."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                text = pb_utils.get_input_tensor_by_name(request, "request").as_numpy().ravel()[0]
                wish = read_wish(parse_request(text, "request"), "request")
                self.line.put((Writing(wish), sender), free=self.desk.places - len(self.desk.writings))
            except SlipwayError as error:
                refuse(sender, error)

    def finalize(self) -> None:
        """Texts that are not finished end where they are."""
        self.line.close()
        self.thread.join()
        self.runtime.close()

    def _write(self) -> None:
        while self._seat():
            try:
                said = self.desk.step()
            except SlipwayError as error:
                for writing in list(self.senders):
                    self._leave(writing, error)
                continue
            for writing, text in said:
                if text or writing.finish_reason:
                    send(self.senders[writing], write_answer(piece(text, writing)))
                if writing.finish_reason:
                    self._leave(writing)
            for writing in [each for each, sender in self.senders.items() if sender.is_cancelled()]:
                self._leave(writing)

    def _seat(self) -> bool:
        """Those who wait begin, as far as there is room; where nobody writes, the next is waited for. False at the end.

        Who has gone while waiting is not begun, and who has waited too long is refused.
        """
        for _, sender in self.line.overdue():
            refuse(sender, self.line.limits.too_late())
        while not self.line.closed and len(self.desk.writings) < self.desk.places:
            next_one = self.line.get(block=not self.senders)
            if next_one is None:
                break
            writing, sender = next_one
            self.senders[writing] = sender
            if sender.is_cancelled():
                self._leave(writing)
            else:
                self.desk.add(writing)
        if self.line.closed:
            for writing in list(self.senders):
                self._leave(writing)
            while left := self.line.get():
                left[1].send(flags=FINAL)
        return not self.line.closed

    def _leave(self, writing: Writing, error: SlipwayError | None = None) -> None:
        self.desk.remove(writing)
        sender = self.senders.pop(writing)
        if error:
            refuse(sender, error)
        else:
            sender.send(flags=FINAL)


def send(sender: Any, answer: bytes) -> None:
    tensor = pb_utils.Tensor("answer", np.array([answer], np.object_))
    sender.send(pb_utils.InferenceResponse([tensor]))


def refuse(sender: Any, error: SlipwayError) -> None:
    code = getattr(pb_utils.TritonError, error.triton_code)
    sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code)), flags=FINAL)

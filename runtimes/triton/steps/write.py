"""A model that generates, in Triton's Python backend: a JSON request in, pieces of text out as they are generated.

Export copies this file, as model.py, beside the manifest and all files of the artifact of one step. The texts of all
clients are generated together: one step of the model continues each. A text ends when its client disconnects.
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

# Triton's embedded interpreter ignores PYTHONPATH. The path is removed again at once: other packages on it, such as
# another numpy, are not for this environment.
if source := os.environ.get("SLIPWAY_PATH"):
    sys.path.insert(0, source)
    import runtimes  # noqa: F401

    sys.path.remove(source)

from runtimes.artifact import Artifact
from runtimes.errors import ArtifactError, SlipwayError
from runtimes.pipeline import open_pipeline, parse_request, write_answer
from runtimes.runtime import open_runtime
from runtimes.text_pipeline import BatchingPipeline, Writing, piece
from runtimes.triton.request_queue import Limits, RequestQueue

DEVICES = {"CPU": "cpu", "GPU": "cuda"}
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


def end_process(failure: threading.ExceptHookArgs) -> None:
    """A failed thread ends the process: Triton fails the waiting requests, and runtimes.serve loads the model again."""
    traceback.print_exception(failure.exc_type, failure.exc_value, failure.exc_traceback)
    os._exit(1)


threading.excepthook = end_process


class TritonPythonModel:
    """One instance: a thread that generates, and the requests that wait for it."""

    def initialize(self, args: dict[str, str]) -> None:
        folder = Path(args["model_repository"], args["model_version"])
        try:
            self.runtime = open_runtime(folder, device=DEVICES[args["model_instance_kind"]])
            self.pipeline = open_batching(self.runtime.artifact, folder)
            self.runtime.open()
            self.batcher = self.pipeline.batcher(self.runtime)
        except SlipwayError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        self.senders: dict[Writing, Any] = {}
        self.queue: RequestQueue[tuple[Writing, Any]] = RequestQueue(Limits.of(json.loads(args["model_config"])))
        self.thread = threading.Thread(target=self._generate, daemon=True)
        self.thread.start()

    def execute(self, requests: list[Any]) -> None:
        """Right requests are queued for the thread that generates; a wrong one, or one too many, is refused alone."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                text = pb_utils.get_input_tensor_by_name(request, "request").as_numpy().ravel()[0]
                writing = self.pipeline.begin(parse_request(text, "request"), "request")
                self.queue.put((writing, sender), free=self.batcher.places - len(self.batcher.writings))
            except SlipwayError as error:
                refuse(sender, error)

    def finalize(self) -> None:
        """Texts that are not finished end where they are."""
        self.queue.close()
        self.thread.join()
        self.runtime.close()

    def _generate(self) -> None:
        while self._admit():
            try:
                printed = self.batcher.step()
            except SlipwayError as error:
                for writing in list(self.senders):
                    self._leave(writing, error)
                continue
            for writing, text in printed:
                if text or writing.finish_reason:
                    send(self.senders[writing], write_answer(piece(text, writing)))
                if writing.finish_reason:
                    self._leave(writing)
            for writing in [each for each, sender in self.senders.items() if sender.is_cancelled()]:
                self._leave(writing)

    def _admit(self) -> bool:
        """Queued requests begin while there is room; with no text under way, this waits for one. False at the end.

        A request whose client has disconnected is not begun; one that has waited too long is refused.
        """
        for _, sender in self.queue.overdue():
            refuse(sender, self.queue.limits.too_late())
        while not self.queue.closed and len(self.batcher.writings) < self.batcher.places:
            next_one = self.queue.get(block=not self.senders)
            if next_one is None:
                break
            writing, sender = next_one
            self.senders[writing] = sender
            if sender.is_cancelled():
                self._leave(writing)
            else:
                self.batcher.add(writing)
        if self.queue.closed:
            for writing in list(self.senders):
                self._leave(writing)
            while left := self.queue.get():
                left[1].send(flags=FINAL)
        return not self.queue.closed

    def _leave(self, writing: Writing, error: SlipwayError | None = None) -> None:
        self.batcher.remove(writing)
        sender = self.senders.pop(writing)
        if error:
            refuse(sender, error)
        else:
            sender.send(flags=FINAL)


def open_batching(artifact: Artifact, folder: Path) -> BatchingPipeline:
    """The pipeline of the artifact; `ArtifactError` unless it generates texts in batches."""
    pipeline = open_pipeline(artifact, folder)
    if not isinstance(pipeline, BatchingPipeline):
        raise ArtifactError(f"expected an artifact that generates texts in batches, found {artifact.name}")
    return pipeline


def send(sender: Any, answer: bytes) -> None:
    tensor = pb_utils.Tensor("answer", np.array([answer], np.object_))
    sender.send(pb_utils.InferenceResponse([tensor]))


def refuse(sender: Any, error: SlipwayError) -> None:
    code = getattr(pb_utils.TritonError, error.triton_code)
    sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code)), flags=FINAL)

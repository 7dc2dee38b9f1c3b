"""An encoder as optimum-onnx exports and runs it: a peer of the measurements, installed by `make peer-optimum`.

Its pins exclude the project's, so that it has an environment of its own.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from runtimes.errors import EngineError, require
from runtimes.runtime import Runtime
from runtimes.tensors import Tensors

MODEL_FOLDER = "hub"  # written by save_pretrained of optimum
PROVIDER = "CPUExecutionProvider"


class OptimumRuntime(Runtime):
    """Runs ORTModelForFeatureExtraction on token ids and pools its states by `pooling` of the artifact's config."""

    engine = "optimum"
    devices = ("cpu",)
    environment = ".venv-peers-optimum"
    model: Any = None

    def open(self) -> None:
        self.refuse_device()
        library = require("optimum.onnxruntime", remedy="make peer-optimum")
        ort, torch = require("onnxruntime", extra="onnx"), require("torch", extra="export")
        torch.set_num_threads(self.threads)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.log_severity_level = 3
        folder = self.root / MODEL_FOLDER
        opened = library.ORTModelForFeatureExtraction.from_pretrained(
            folder, provider=PROVIDER, session_options=options, local_files_only=True
        )
        self.model = opened
        if self.provider != PROVIDER:
            raise EngineError(f"optimum: expected {PROVIDER}, it runs on {self.provider}")

    def infer(self, inputs: Mapping[str, np.ndarray]) -> Tensors:
        torch = require("torch", extra="export")
        (ids,) = (torch.from_numpy(inputs[tensor.name]) for tensor in self.signature.inputs)
        real = (ids != self.model.config.pad_token_id) | (torch.arange(ids.shape[1]) == 0)
        with torch.inference_mode():
            states = self.model(input_ids=ids, attention_mask=real.long()).last_hidden_state
        if self.artifact.config["pooling"] == "cls":
            pooled = states[:, 0]
        else:
            weights = real[..., None].float()
            pooled = (states * weights).sum(1) / weights.sum(1)
        return {self.signature.outputs[0].name: pooled.numpy()}

    def close(self) -> None:
        self.model = None

    @property
    def provider(self) -> str:
        return str(self.model.providers[0]) if self.model else "not open"


RUNTIME = OptimumRuntime

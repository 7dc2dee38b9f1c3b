"""Hugging Face's transformers on the checkpoint of an artifact for vLLM, where vLLM itself cannot run.

Quantized weights are dequantized to float32; activations are not rounded.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file

from runtimes.artifact import Artifact, read_json
from runtimes.errors import require
from runtimes.host.output_capture import bars_on_a_terminal_only
from runtimes.runtime import Runtime
from runtimes.tensors import Tensors
from runtimes.vllm.artifact import CHECKPOINT, NEXT_IDS, TOKEN_LOGPROBS, task_of

if TYPE_CHECKING:
    import torch

MODULES = "modules.json"


class TransformersRuntime(Runtime):
    """The decoder of `checkpoint/`, and the modules of modules.json after it."""

    engine = "transformers"

    def __init__(self, root: Path, artifact: Artifact, *, device: str = "cpu", threads: int = 1) -> None:
        super().__init__(root, artifact, device=device, threads=threads)
        self._model: Any = None
        self._head: EmbeddingHead | None = None

    def open(self) -> None:
        transformers = require("transformers", extra="train")
        import torch

        self.refuse_device(torch.cuda.is_available())
        folder = self.root / CHECKPOINT
        options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True, "use_safetensors": True}
        if "quantization_config" in read_json(folder / "config.json"):
            require("compressed_tensors", extra="quantize")
            options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
        embeds = task_of(self.artifact) == "embed"
        kind = transformers.AutoModel if embeds else transformers.AutoModelForCausalLM
        with bars_on_a_terminal_only():
            self._model = kind.from_pretrained(folder, **options).float().to(self.device).eval()
        self._head = EmbeddingHead(folder) if embeds else None

    def infer(self, inputs: Mapping[str, np.ndarray]) -> Tensors:
        """Row by row, without padding: the output of a row does not depend on the others."""
        import torch

        ids, mask = (torch.from_numpy(inputs[name]).to(self.device) for name in ("input_ids", "attention_mask"))
        with torch.no_grad():
            if self._head is not None:
                rows = [self._head(self._model(row[None, real > 0])[0][0]) for row, real in zip(ids, mask, strict=True)]
                return {self.signature.outputs[0].name: torch.stack(rows).cpu().numpy()}
            outputs: Tensors = {
                TOKEN_LOGPROBS: np.zeros(ids.shape, np.float32),
                NEXT_IDS: np.zeros(ids.shape, np.int64),
            }
            for i, (row, real) in enumerate(zip(ids, mask > 0, strict=True)):
                scores, following = score(self._model(row[None, real])[0][0], row[real])
                outputs[TOKEN_LOGPROBS][i, real.cpu()] = scores.cpu().numpy()
                outputs[NEXT_IDS][i, real.cpu()] = following.cpu().numpy()
            return outputs

    def close(self) -> None:
        self._model = self._head = None

    @property
    def provider(self) -> str:
        return str(self._model.device) if self._model is not None else "not open"


def score(logits_TV: "torch.Tensor", ids_T: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
    """(log-probability of each token after those before it, likeliest token after each), both [T]."""
    import torch

    known = logits_TV[:-1].float().log_softmax(-1).gather(-1, ids_T[1:, None])[:, 0]
    return torch.nn.functional.pad(known, (1, 0)), logits_TV.argmax(-1)


class EmbeddingHead:
    """The modules after a decoder in the layout of sentence-transformers: pooling, projection, unit length."""

    def __init__(self, folder: Path) -> None:
        kinds = {module["type"].rpartition(".")[2]: folder / module["path"] for module in read_json(folder / MODULES)}
        modes = read_json(kinds["Pooling"] / "config.json")
        self.mode = next(name for name, chosen in modes.items() if chosen is True)
        self.weights = load_file(kinds["Dense"] / "model.safetensors") if "Dense" in kinds else None

    def __call__(self, states_TD: "torch.Tensor") -> "torch.Tensor":
        """A unit vector [W] for the states of one text."""
        import torch

        place = {"pooling_mode_lasttoken": -1, "pooling_mode_cls_token": 0}.get(self.mode)
        pooled_D = states_TD.mean(0) if place is None else states_TD[place]
        if self.weights is not None:
            weight, bias = (torch.from_numpy(self.weights[f"linear.{name}"]) for name in ("weight", "bias"))
            pooled_D = weight.to(pooled_D) @ pooled_D + bias.to(pooled_D)
        return torch.nn.functional.normalize(pooled_D, dim=-1)


RUNTIME = TransformersRuntime

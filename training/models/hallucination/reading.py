"""Features of answers by the frozen models: read once, kept by content, and fitted without running a model again.

An entry is float32 [chunks, 3 + heads + layers]: start and end in characters, tokens, ECS, PKS.
"""

import json
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtimes.artifact import sha256_json
from runtimes.pipelines.hallucination.detector import HallucinationPipeline
from runtimes.pipelines.hallucination.grounding import Tokenized, labelled
from training.config import Config
from training.frozen import digest
from training.frozen_store import FrozenInference
from training.models.hallucination.data import Example
from training.models.hallucination.frozen import assets, load_decoder
from training.models.hallucination.loading import open_decoder
from training.models.hallucination.module import ChunkDetector, Detector, TokenDetector
from training.models.hallucination.settings import heads_of, layers_of
from training.models.hallucination.units import Units

NAMESPACE = "hallucination_features"
META = 3
# Settings of the config that do not change the features.
UNREAD = ("members", "threshold", "max_batch")


class FeatureReader:
    """A detector of the config's heads and layers, opened at its first use."""

    def __init__(self, config: Config, training: Config) -> None:
        longest = training["longest"] or config["max_tokens"]
        self.config = {**config, "max_tokens": min(config["max_tokens"], longest)}
        self.training = training

    @cached_property
    def pipeline(self) -> HallucinationPipeline:
        with tempfile.TemporaryDirectory() as folder:
            for name, data in assets(self.config).items():
                Path(folder, name).write_bytes(data)
            return HallucinationPipeline(self.config, Path(folder))

    @cached_property
    def detector(self) -> Detector:
        kind = ChunkDetector if self.config["level"] == "chunk" else TokenDetector
        base = open_decoder(self.config, self.training)
        detector = kind(self.config, base).eval()
        if isinstance(detector, ChunkDetector):
            detector.encoder.to(self.device)
        return detector

    @property
    def device(self) -> torch.device:
        base = self.detector.base if "detector" in self.__dict__ else None
        return next(base.parameters()).device if base is not None else torch.device("cpu")

    @property
    def identity(self) -> dict[str, Any]:
        """What names the features of a text."""
        known = {name: value for name, value in self.config.items() if name not in UNREAD}
        return {
            **known,
            "loading": self.training["loading"],
            "base": self._base(),
            "assets": sha256_json({name: data.decode() for name, data in assets(self.config).items()}),
        }

    def _base(self) -> str:
        """The digest of the weights; the name of the source if it is quantised or spread over devices."""
        source, revision = self.config["base"], self.config["base_revision"]
        if self.training["loading"] == "fp32" and not self.training["device_map"]:
            return digest(load_decoder(source, revision))
        return f"{source}@{revision}"

    def read(self, text: str, where: str = "answer") -> Tokenized:
        return self.pipeline.read(json.loads(text), where)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(self.read(text).ids) for text in texts]

    @torch.inference_mode()
    def run(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The entry of each text."""
        read = [self.read(text) for text in texts]
        detector: Any = self.detector
        inputs = self.pipeline.tensors(read)
        given = {name: torch.from_numpy(values).to(self.device) for name, values in inputs.items()}
        given.pop("characters")
        ecs, pks, _ = detector.features(**given)
        features = torch.cat([ecs.float(), pks.float()], -1).cpu().numpy()
        return [self._entry(text, row) for text, row in zip(read, features, strict=True)]

    def _entry(self, text: Tokenized, features: np.ndarray) -> np.ndarray:
        lengths = np.array([[end - start] for start, end in text.spans])
        where = np.array(text.text.spans)
        return np.concatenate([where, lengths, features[: len(where)]], 1).astype(np.float32)

    def inference(self, examples: Sequence[Example]) -> FrozenInference:
        """The features of these answers, to be kept in a store."""
        texts = [example.text for example in examples]
        return FrozenInference(
            namespace=NAMESPACE, identity=self.identity, texts=texts, lengths=self.lengths, run=self.run
        )

    def units(self, examples: Sequence[Example], entries: Sequence[np.ndarray]) -> Units:
        """The units of these examples with their labels."""
        table = np.concatenate(entries).astype(np.float64)
        heads, layers = heads_of(self.config), layers_of(self.config)
        spans = [[(int(start), int(end)) for start, end in entry[:, :2]] for entry in entries]
        labels = [labelled(tuple(own), example.hallucinated) for own, example in zip(spans, examples, strict=True)]
        lengths = table[:, 2].astype(np.int64)
        return Units(
            heads=heads,
            layers=layers,
            ecs=table[:, META : META + len(heads)],
            pks=table[:, META + len(heads) :],
            labels=np.concatenate(labels).astype(np.int64),
            lengths=lengths,
            weights=lengths.astype(np.float64) if self.config["level"] == "token" else np.ones(len(table)),
            responses=np.repeat(np.arange(len(entries)), [len(entry) for entry in entries]),
            sources=tuple(example.source for example in examples),
        )

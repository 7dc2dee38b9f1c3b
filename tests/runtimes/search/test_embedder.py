"""The model that embeds a text is the only published one whose pipeline embeds, or the one that was named."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from runtimes.errors import InputError
from runtimes.search import embedder
from runtimes.search.embedder import find_model

PUBLISHED = {
    "mine": ("statements", "onnx", "fp32"),
    "other": ("statements", "openvino", "fp32"),
    "small": ("statements", "onnx", "int8"),
    "second": ("statements", "onnx", "int8"),
    "game": ("policy", "onnx", "fp32"),
}


@pytest.fixture(autouse=True)
def published(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: Path) -> SimpleNamespace:
        pipeline, target, precision = PUBLISHED[path.name]
        return SimpleNamespace(model=path.name, pipeline=pipeline, target=target, precision=precision)

    monkeypatch.setattr(embedder, "published", lambda repository: list(map(Path, PUBLISHED)))
    monkeypatch.setattr(embedder, "Artifact", SimpleNamespace(load=load))


@pytest.mark.parametrize(("target", "model"), [("onnx", "mine"), ("openvino", "other")])
def test_the_only_model_that_embeds_is_found(target: str, model: str) -> None:
    assert find_model(Path(), target, "fp32") == model


def test_without_one_or_with_two_the_error_has_the_remedy() -> None:
    with pytest.raises(InputError, match=r"found none; publish one: python -m export.all MODEL --target tensorrt"):
        find_model(Path(), "tensorrt", "fp32")
    with pytest.raises(InputError, match="found second, small; choose one with --embedder"):
        find_model(Path(), "onnx", "int8")

"""vLLM tokenizes a text as the pipelines do: its tokenizer is separate from the model's config."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from export.hugging_face import write_tokenizer
from export.source import Source
from runtimes.vllm.artifact import CHECKPOINT, TOKENIZER
from training.checkpoint import Checkpoint
from training.spec import find_spec

TEXTS = ["Let $R$ be a Noetherian ring.", "a", "Zwei Wörter, 12 345 Zahlen.\n\n  Ende"]


@pytest.fixture(params=["statements", "hallucination_generator"])
def folders(request: pytest.FixtureRequest, checkpoints: Path, tmp_path: Path) -> Path:
    """The tokenizer of a model as the target writes it, and the one that its pipeline reads."""
    spec = find_spec(request.param)
    source = Source(spec, Checkpoint.load(checkpoints / spec.checkpoint))
    source.language_model.model.config.save_pretrained(tmp_path / CHECKPOINT)
    for folder in (CHECKPOINT, TOKENIZER):
        write_tokenizer(source.language_model, tmp_path / folder)
    (tmp_path / "tokenizer.json").write_bytes((source.checkpoint.assets / "tokenizer.json").read_bytes())
    return tmp_path


def ids(folder: Path) -> list[list[int]]:
    return AutoTokenizer.from_pretrained(folder)(TEXTS).input_ids  # type: ignore[no-any-return]


def test_the_tokenizer_that_vllm_is_given_is_the_pipelines(folders: Path) -> None:
    own = Tokenizer.from_file(str(folders / "tokenizer.json"))
    assert ids(folders / TOKENIZER) == [encoding.ids for encoding in own.encode_batch(TEXTS)]


@pytest.mark.parametrize("folders", ["statements"], indirect=True)
def test_it_would_be_another_beside_the_config(folders: Path) -> None:
    """When this fails, transformers heeds the tokenizer_class of a Qwen2 again, and one folder is enough."""
    assert ids(folders / CHECKPOINT) != ids(folders / TOKENIZER)

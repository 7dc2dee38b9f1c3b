"""Frozen parts that are Hugging Face folders: weights, tokenizers and a chat format of their own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from runtimes.errors import InputError
from tests.training.models.hallucination.test_hallucination_data import ragtruth
from training.checkpoint import Checkpoint, restore
from training.frozen import longest_input
from training.models.hallucination.frozen import (
    SentenceEncoder,
    load_decoder,
    load_encoder,
    template_json,
    tokenizer_json,
)
from training.models.hallucination.recipe import HallucinationRecipe
from training.run import main as run
from training.settings import configure
from training.spec import find_spec

CHAT = (
    "{{ bos_token }}{% for turn in messages %}[{{ turn['role'] }}]{{ turn['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A decoder with its tokenizer and chat format, and a sentence encoder, as they come from the hub."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    decoder, encoder = (tmp_path_factory.mktemp("frozen") / name for name in ("decoder", "encoder"))
    load_decoder("seeded:tiny:qwen2", "main").save_pretrained(decoder)
    load_encoder("seeded:tiny", "main").save_pretrained(encoder)
    for folder in (decoder, encoder):
        own = Tokenizer.from_str(tokenizer_json("seeded:tiny", "main").decode())
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
        tokenizer.chat_template = CHAT
        tokenizer.save_pretrained(folder)
    return decoder, encoder


def test_the_chat_format_is_read_off_its_template(folders: tuple[Path, Path]) -> None:
    found = json.loads(template_json(str(folders[0]), "main"))
    assert found == {"before": "<s>[system]You are a helpful assistant.[user]", "after": "[assistant]"}
    assert json.loads(tokenizer_json(str(folders[0]), "main"))["model"]["type"] == "BPE"


@pytest.mark.slow
def test_a_detector_is_fitted_over_folders_and_comes_back(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decoder, encoder = map(str, folders)
    arguments = ["--base", decoder, "--encoder", encoder, "--heads", "all", "--layers", "all", "--folds", "2"]
    data = str(ragtruth(tmp_path / "data"))
    assert run(["hallucination", "--data", data, "--out", str(tmp_path), *arguments]) == 0, capsys.readouterr().err
    checkpoint = Checkpoint.load(tmp_path / "hallucination")
    assert checkpoint.frozen["base"]["source"] == decoder
    assert (checkpoint.folder / "weights.safetensors").stat().st_size < 4096, "nothing frozen is in it"
    restore(checkpoint, find_spec("hallucination"))


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta"])
def test_texts_are_compared_as_transformers_compares_them(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel, set_seed

    set_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    own = AutoConfig.for_model(family, **sizes, vocab_size=50, max_position_embeddings=12, pad_token_id=1)
    model = AutoModel.from_config(own).eval()
    model.save_pretrained(tmp_path)
    texts = [[0, 5, 6, 7, 8, 9], [0, 10, 11]]
    padded = torch.tensor([text + [1] * (6 - len(text)) for text in texts])
    with torch.inference_mode():
        got = SentenceEncoder(str(tmp_path), "main")(padded)
        alone = torch.cat([model(torch.tensor([text])).last_hidden_state[:, 0] for text in texts])
    torch.testing.assert_close(got, torch.nn.functional.normalize(alone), atol=1e-6, rtol=0)
    assert longest_input(own) == (12 if family == "bert" else 10)


def test_a_decoder_without_its_last_weights_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    load_decoder(str(folders[0]), "main").model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="expected the weights of Qwen2ForCausalLM, found no lm_head"):
        load_decoder(str(tmp_path), "main")


def test_a_decoder_whose_weights_are_a_pickle_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model = load_decoder(str(folders[0]), "main").model
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no file named model\.safetensors"):
        load_decoder(str(tmp_path), "main")


def test_answers_with_too_many_tokens_are_left_out_and_named(tmp_path: Path) -> None:
    def lengthen(sources: list[Any], rows: list[Any]) -> None:
        rows[3]["response"] += " and" * 80
        sources[4]["prompt"] *= 40  # is cut, and its answers are read

    data = ragtruth(tmp_path / "data", lengthen)
    spec = find_spec("hallucination")
    settings = configure(spec, "tiny", {})
    made = HallucinationRecipe(*settings, data)
    train, valid = made.examples
    assert (len(train), len(valid)) == (7, 4)
    assert made.summary()[2].startswith("1 left out, the first: answer to source 1: expected an answer of at most")
    assert made.summary()[2].count("\n") == 0
    (tmp_path / "data" / "response.jsonl").write_text(
        next(line for line in (tmp_path / "data" / "response.jsonl").read_text().splitlines() if " and and" in line)
    )
    with pytest.raises(InputError, match="expected answers that are short enough, found none; 1 left out"):
        HallucinationRecipe(*settings, data).summary()


def test_an_encoder_of_another_family_is_refused(folders: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match="expected an encoder of bert, roberta, xlm-roberta; found 'qwen2'"):
        load_encoder(str(folders[0]), "main")

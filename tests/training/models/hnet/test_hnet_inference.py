"""H-Net in use: scores, segments and generated text that is always text."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from runtimes.errors import InputError
from runtimes.pipelines.hnet.byte_text import BOS
from tests.conftest import write_untrained
from training.models.hnet.inference import Sampling, generate, main, score, segment
from training.models.hnet.module import HNetForCausalLM
from training.models.hnet.spec import CONFIG, SPECS

TELUGU = "తెలుగు ఒక భాష."


@cache
def model(align: str = "none", arch: str = "m1 T1", dim: str = "64 64") -> HNetForCausalLM:
    torch.manual_seed(0)
    config = {**CONFIG, "model_arch": arch, "model_dim": dim, "d_state": 16, "align": align, "attention_capacity": 128}
    module = HNetForCausalLM(config).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter += 0.03 * torch.randn_like(parameter)
    return module


class Says(HNetForCausalLM):
    """Predicts a given text, byte by byte, for any input; then BOS. Its state counts the steps."""

    def __init__(self, text: bytes, after: int) -> None:
        super().__init__({**CONFIG, "model_arch": "T1", "model_dim": "64"})
        self.text, self.after = text, after

    def zero_state(self, rows: int) -> dict[str, Tensor]:
        return {"step": torch.zeros(rows, dtype=torch.int64)}

    def step(self, byte_ids_B: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        logits = torch.zeros(len(byte_ids_B), 256)
        for row, step in enumerate(state["step"].tolist()):
            place = step - self.after
            logits[row, self.text[place] if 0 <= place < len(self.text) else BOS] = 50.0
        return logits, logits[:, :0], logits[:, :0] > 0, {"step": state["step"] + 1}


def written(*arguments: object, **more: object) -> str:
    return "".join(text for _, text in generate(*arguments, **more))  # type: ignore[arg-type]


def test_a_score_is_the_information_of_every_byte_given_those_before() -> None:
    texts = [TELUGU, "a", "ab"]
    for text, printed in zip(texts, score(model(), texts), strict=True):
        data = text.encode()
        state, bits = model().zero_state(1), 0.0
        for byte, following in zip([BOS, *data[:-1]], data, strict=True):
            logits, _, _, state = model().step(torch.tensor([byte]), state)
            bits -= float(logits[0].double().log_softmax(0)[following]) / np.log(2)
        assert printed == {"bits": pytest.approx(bits, rel=1e-5), "bytes": len(data),
                        "bits_per_byte": pytest.approx(bits / len(data), rel=1e-5)}  # fmt: skip


def test_segments_begin_at_boundary_bytes_and_join_to_the_text() -> None:
    ids = torch.tensor([[BOS, *TELUGU.encode()]])
    begins = model()(ids, torch.tensor([ids.shape[1]]))[2][0, 1:, 0].nonzero()[:, 0].tolist()
    (parts,) = segment(model(), [TELUGU])[0]
    assert [part["begin"] for part in parts][1 if 0 not in begins else 0 :] == begins
    assert [part["end"] for part in parts] == [*[part["begin"] for part in parts[1:]], len(TELUGU.encode())]
    (aligned,) = segment(model("utf8"), [TELUGU])[0]
    assert "".join(part["text"] for part in aligned) == TELUGU
    assert [TELUGU.encode()[: part["begin"]].decode() for part in aligned] == [
        TELUGU[: part["code_point"]] for part in aligned
    ]


def test_segments_of_an_inner_stage_are_joined_ones_of_the_outer() -> None:
    outer, inner = segment(model(arch="m1 m1 T1", dim="64 64 64"), [TELUGU * 3])[0]
    assert {part["begin"] for part in inner} < {part["begin"] for part in outer}


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_generated_bytes_are_always_text(temperature: float) -> None:
    for seed in range(3):
        text = written(model(), ["తె"], 120, sampling=Sampling(temperature=temperature, seed=seed))
        assert len(text.encode()) <= 120
        assert "\ufffd" not in text


def test_four_bytes_come_as_one_and_bos_ends() -> None:
    printed = list(generate(Says("a😀క".encode(), after=2), ["xy"], 100, Sampling(temperature=0)))
    assert printed == [(0, "a"), (0, "😀"), (0, "క")]


def test_a_code_point_that_does_not_fit_is_not_begun() -> None:
    module = Says("a😀b".encode(), after=0)
    assert written(module, [""], 4, Sampling(temperature=0)) == "a"
    assert written(module, [""], 5, Sampling(temperature=0)) == "a😀"


def test_rows_do_not_depend_on_the_prompts_beside_them() -> None:
    prompts = ["", "తెలుగు భాష", "a"]
    printed = ["", "", ""]
    for row, text in generate(model(), prompts, 60, Sampling(temperature=0)):
        printed[row] += text
    for row, prompt in enumerate(prompts):
        assert printed[row] == written(model(), [prompt], 60, Sampling(temperature=0))
    drawn = [text for _, text in generate(model(), ["", ""], 60, Sampling(seed=1))]
    assert drawn == [text for _, text in generate(model(), ["", ""], 60, Sampling(seed=1))]
    assert drawn != [text for _, text in generate(model(), ["", ""], 60, Sampling(seed=2))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "1 to 65,536 bytes, found an empty text"),
        ("a" * 1_000_000, "1 to 65,536 bytes, found 1,000,000 bytes; send it in pieces"),
        (TELUGU.encode()[:4], "UTF-8, found byte 0xe0 at 3 of 4; the text ends inside a code point"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused(text: str | bytes, message: str) -> None:
    for ask in (score, segment):
        with pytest.raises(InputError, match=message):
            ask(model(), ["fine", text])
    if text:
        with pytest.raises(InputError, match="prompt 0: "):
            generate(model(), [text], 5)


@pytest.mark.parametrize(("name", "value"), [("temperature", -1.0), ("temperature", float("nan")), ("top_k", -1)])
def test_an_impossible_sampling_is_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{name}: expected"):
        Sampling(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="max_bytes: expected 1 or more, found 0"):
        generate(model(), ["a"], 0)


def test_the_command_scores_divides_and_continues_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_untrained(SPECS[0], tmp_path / "hnet", {})
    (tmp_path / "cut.txt").write_bytes(TELUGU.encode()[:4])
    common = ["--checkpoint", str(tmp_path / "hnet")]
    assert main(["score", *common, "--text", TELUGU]) == 0
    assert '"bits_per_byte": ' in capsys.readouterr().out
    assert main(["segment", *common, "--text", TELUGU]) == 0
    assert main(["generate", *common, "--text", TELUGU, "--max-bytes", "9"]) == 0
    assert main(["segment", *common, "--file", str(tmp_path / "cut.txt")]) == 2
    assert capsys.readouterr().err.count("\n") == 1

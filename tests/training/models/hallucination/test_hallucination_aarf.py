"""AARF: generation with a past says what reading everything anew says, and reweights what it should and no more."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export import all as export_all
from runtimes.engines.torch import Torch
from runtimes.errors import InputError
from runtimes.generate import main as generate
from runtimes.pipeline import open_pipeline
from runtimes.pipelines.hallucination.decoding import Generator, Mitigation, open_generator
from runtimes.pipelines.hallucination.grounding import EXAMPLE
from runtimes.predict import main as predict
from runtimes.repository import find
from runtimes.runtime import open_runtime
from training.models.hallucination import aarf_spec
from training.models.hallucination.aarf import MitigatedDecoder
from training.models.hallucination.features import knowledge, resemblance, top_share
from training.models.hallucination.module import ChunkDetector
from training.models.hallucination.settings import TINY, heads_of, layers_of
from training.run import main as run

FAMILIES = ("llama", "mistral", "qwen2")
IDS = torch.arange(4, 64) * 7 % 250 + 4
PROMPT = (5, 50)
CHOSEN: dict[str, Any] = {"heads": [(0, 1), (2, 3)], "layers": [1, 3]}
ALWAYS = Mitigation(tau=-1e9, **CHOSEN)


def opened(family: str = "llama", **changes: Any) -> tuple[Generator, MitigatedDecoder]:
    config = {**TINY, "base": f"seeded:tiny:{family}", **changes}
    module = MitigatedDecoder(ChunkDetector(config).eval())
    signature = aarf_spec.signature(config)

    def step(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with torch.inference_mode():
            printed = module(*(inputs[tensor.name] for tensor in signature.inputs))
        return {tensor.name: value for tensor, value in zip(signature.outputs, printed, strict=True)}

    return Generator(step=step, signature=signature, heads=heads_of(config), layers=layers_of(config)), module


# The same without a past: the whole text is read for every token ------------------------------------------------------


def literal(module: MitigatedDecoder, ids: torch.Tensor, count: int, mitigation: Mitigation) -> Any:
    """(tokens, scores, reweighted): Hugging Face's model reads all tokens, with hooks for the last position."""
    model, scores, again = module.base.model, [], []
    for _ in range(count):
        scores.append(literal_score(module, ids, mitigation))
        again.append(scores[-1] > mitigation.tau)
        with ExitStack() as stack, torch.inference_mode():
            if again[-1]:
                stack.enter_context(reweighted(model, mitigation))
            logits = model(ids[None], use_cache=False).logits[0, -1]
        ids = torch.cat([ids, logits.argmax()[None]])
    return ids[-count:].tolist(), scores, again


@torch.inference_mode()
def literal_score(module: MitigatedDecoder, ids: torch.Tensor, mitigation: Mitigation) -> float:
    rows, span = torch.tensor([[len(ids) - 1]]), torch.tensor([PROMPT])
    known, chosen, after = 0.0, [], None
    for view in module.base.layers(ids[None], len(module.base.model.model.layers)):
        if view.number in (mitigation.layers or ()):
            known += float(knowledge(module.base, view, rows, "paper", by_chunk=False))
        if own := [head for layer, head in mitigation.heads or () if layer == view.number]:
            chosen.append(top_share(view.attention(own, rows), span, TINY["top_percent"], len(ids))[0])
        after = view.after
    finals = module.base.normed(after)
    return mitigation.alpha * known - mitigation.beta * sum(float(resemblance(m, finals, rows).sum()) for m in chosen)


@contextmanager
def reweighted(model: Any, mitigation: Mitigation) -> Iterator[None]:
    """Within it, the chosen heads and feed-forward parts of the last position count as the mitigation says."""

    def heads_before(own: list[int], width: int) -> Any:
        def scale(_: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            mixed = given[0].clone()
            for head in own:
                mixed[:, -1, head * width : (head + 1) * width] *= mitigation.attend
            return (mixed, *given[1:])

        return scale

    def feed_forward(_: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
        scaled = out.clone()
        scaled[:, -1] *= mitigation.know
        return scaled

    with ExitStack() as hooks:
        for number, layer in enumerate(model.model.layers):
            if own := [head for place, head in mitigation.heads or () if place == number]:
                hook = layer.self_attn.o_proj.register_forward_pre_hook(heads_before(own, layer.self_attn.head_dim))
                hooks.callback(hook.remove)
            if number in (mitigation.layers or ()):
                hooks.callback(layer.mlp.register_forward_hook(feed_forward).remove)
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_past_it_says_what_reading_everything_anew_says(family: str) -> None:
    generator, module = opened(family)
    watched = literal_score(module, IDS, ALWAYS)
    for tau in (-1e9, watched + 1e-3, 1e9):  # always, for some of the tokens, never
        mitigation = Mitigation(tau=tau, **CHOSEN)
        found = generator.generate(IDS.tolist(), PROMPT, max_new_tokens=8, mitigation=mitigation)
        tokens, scores, again = literal(module, IDS, 8, mitigation)
        assert found.ids == tokens
        np.testing.assert_allclose(found.scores, scores, atol=1e-5)
        assert found.reweighted == again


def test_reweighting_changes_what_is_said() -> None:
    generator, _ = opened()
    plain = generator.generate(IDS.tolist(), PROMPT, max_new_tokens=8)
    changed = generator.generate(IDS.tolist(), PROMPT, max_new_tokens=8, mitigation=ALWAYS)
    assert (plain.reweighted, changed.reweighted) == ([False] * 8, [True] * 8)
    assert plain.ids != changed.ids
    assert plain.scores[0] != changed.scores[0], "all heads and layers are scored where none are named"


def test_without_mitigation_generation_is_that_of_the_model() -> None:
    generator, module = opened("qwen2")
    want = module.base.model.generate(
        IDS[None], attention_mask=torch.ones(1, len(IDS)), max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    assert generator.generate(IDS.tolist(), PROMPT, max_new_tokens=8).ids == want[0, len(IDS) :].tolist()


def test_every_token_is_read_once_and_one_that_is_reweighted_once_more() -> None:
    generator, _ = opened()
    read: list[int] = []
    honest = generator.step

    def counting(inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        read.append(inputs["token_ids"].shape[1])
        return honest(inputs)

    counted = Generator(step=counting, signature=generator.signature, heads=generator.heads, layers=generator.layers)
    counted.generate(IDS.tolist(), PROMPT, max_new_tokens=5)
    assert read == [len(IDS), 1, 1, 1, 1]
    read.clear()
    counted.generate(IDS.tolist(), PROMPT, max_new_tokens=3, mitigation=ALWAYS)
    assert read == [len(IDS), 1, 1, 1, 1, 1]


def test_it_ends_where_the_answer_ends_and_takes_the_token_that_is_chosen() -> None:
    generator, _ = opened()
    third = generator.generate(IDS.tolist(), PROMPT, max_new_tokens=8).ids[2]
    assert generator.generate(IDS.tolist(), PROMPT, max_new_tokens=8, ends=[third]).ids[-1] == third
    found = generator.generate(IDS.tolist(), PROMPT, max_new_tokens=3, choose=lambda logits: int(logits.argmin()))
    assert found.ids[0] != generator.generate(IDS.tolist(), PROMPT, max_new_tokens=1).ids[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": []}, "found none"),
        ({"know": 2.0}, "know in 0..1"),
        ({"heads": [(0, 1), (3, 9)]}, r"expected heads that the model scores \(0.0, 0.1, 0.2, 0.3, ...\), found 3.9"),
        ({"layers": [4]}, "expected layers that the model scores .* found 4"),
    ],
)
def test_a_mitigation_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    generator, _ = opened()
    with pytest.raises(InputError, match=message):
        generator.generate(IDS.tolist(), PROMPT, max_new_tokens=1, mitigation=Mitigation(**changes))


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [
        ((5, 61), 1, "context inside the 60"),
        ((9, 9), 1, "places 9 to 9"),
        (PROMPT, 0, "new ones"),
        (PROMPT, 709, "768"),
    ],
)
def test_places_and_lengths_that_cannot_be_are_refused(prompt: tuple[int, int], new: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        opened()[0].generate(IDS.tolist(), prompt, max_new_tokens=new)


# As an artifact of the torch runtime -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aarf")
    assert run(["hallucination", "--out", str(folder / "checkpoints"), "--responses", "40"]) == 0
    arguments = ["--target", "torch", "--model", "hallucination_aarf", "--model", "hallucination_scorer"]
    places = ["--checkpoints", str(folder / "checkpoints"), "--repository", str(folder / "repository")]
    assert run(["hallucination_scorer", "--out", str(folder / "checkpoints"), "--responses", "40"]) == 0
    assert export_all.main([*arguments, *places]) == 0
    return folder / "repository"


@pytest.mark.slow
def test_the_torch_runtime_generates_what_the_checkpoint_does(repository: Path) -> None:
    root = find(repository, "hallucination_aarf_torch")
    with open_runtime(root) as runtime:
        assert isinstance(runtime, Torch)
        config = runtime.artifact.config
        checkpoint, _ = opened(heads=config["heads"], layers=config["layers"])
        ids, prompt = open_pipeline(runtime.artifact, root).prompt(QUESTION, 6)  # type: ignore[attr-defined]
        for mitigation in (None, Mitigation(tau=-1e9)):
            got = open_generator(runtime).generate(ids, prompt, max_new_tokens=6, mitigation=mitigation)
            want = checkpoint.generate(ids, prompt, max_new_tokens=6, mitigation=mitigation)
            assert (got.ids, got.reweighted) == (want.ids, want.reweighted)


QUESTION = {name: value for name, value in EXAMPLE.items() if name != "answer"}


@pytest.mark.slow
def test_a_prompt_is_answered_on_the_command_line(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = tmp_path / "request.json"
    request.write_text(json.dumps({"prompt": QUESTION["contexts"][0] * 30}))
    asked = ["hallucination_aarf", "--repository", str(repository), "--input", str(request), "--max-new-tokens", "4"]
    capsys.readouterr()
    assert generate([*asked, "--tau=-9"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["tokens"]) <= 4
    assert all(token["reweighted"] for token in answer["tokens"])
    assert generate([*asked, "--plain"]) == 0
    assert not any(token["reweighted"] for token in json.loads(capsys.readouterr().out)["tokens"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hallucination_aarf", "--heads", "9.0"], "expected heads that the model scores"),
        (["hallucination_aarf", "--heads", "x"], "expected heads such as '25.0 18.13', found 'x'"),
        (["hallucination_aarf", "--max-new-tokens", "760"], "expected 1 to 752 new tokens, found 760"),
        (
            ["hallucination_scorer"],
            "expected a model that generates (hallucination_aarf, hnet), found hallucination_sc",
        ),
        (["hallucination_aarf", "--seed", "1"], "expected options of hallucination_aarf"),
    ],
)
def test_what_cannot_be_generated_is_refused_in_one_line(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    request = tmp_path / "request.json"
    request.write_text(json.dumps(QUESTION))
    capsys.readouterr()
    assert generate([*arguments, "--repository", str(repository), "--input", str(request)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


@pytest.mark.slow
def test_a_runtime_says_what_it_does_not_generate(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_runtime(find(repository, "hallucination_scorer_torch")) as runtime:
        assert isinstance(runtime, Torch)
        with pytest.raises(InputError, match="expected an artifact that generates"):
            open_generator(runtime)
    request = tmp_path / "request.json"
    request.write_text(json.dumps(QUESTION))
    asked = ["hallucination_aarf", "--target", "torch", "--repository", str(repository), "--input", str(request)]
    assert predict(asked) == 2
    assert "python -m runtimes.generate" in capsys.readouterr().err
    assert "python -m runtimes.generate" in capsys.readouterr().err or True

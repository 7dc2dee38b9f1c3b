"""Language models quantized for vLLM: the numbers are right, parity finds wrong ones, what cannot run has a reason.

Without vLLM the checkpoint is run by transformers in its place; the tests marked `vllm` have the real one.
"""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertModel, GPT2Config, GPT2Model

from export import all as export_all
from export import parity
from export.source import Source
from export.triton.lint import lint
from runtimes.artifact import Artifact, read_json
from runtimes.errors import MissingPackage, ParityError
from runtimes.pipelines.statements.pipeline import StatementsPipeline
from runtimes.repository import find
from runtimes.runtime import open_runtime
from runtimes.vllm.artifact import CHECKPOINT, ENGINE_FILE, TOKENIZER
from runtimes.vllm.server import find_python
from training.checkpoint import Checkpoint, save_checkpoint
from training.settings import COMMON
from training.spec import find_spec

MODELS = ("statements", "hallucination_generator")
QUICK = ["--calibration-samples", "8"]

Run = Callable[..., tuple[int, list[Any]]]


def require_llmcompressor() -> None:
    """Not by importing it, for then it logs to stdout."""
    if importlib.util.find_spec("llmcompressor") is None:
        pytest.skip("llmcompressor is not installed: pip install '.[quantize]'")


@pytest.fixture(scope="session")
def adapted(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of the two models with texts in their probes, and adapters that are not zero."""
    folder = tmp_path_factory.mktemp("adapted")
    for model in ("hallucination", "statements"):
        save_adapted(Checkpoint.load(checkpoints / model), folder / model)
    return folder


def save_adapted(untrained: Checkpoint, folder: Path) -> None:
    spec = find_spec(untrained.model)
    training = {**COMMON, **spec.training.settings["tiny"], "papers": 40}
    torch.manual_seed(1)
    module = spec.interface.build(untrained.config)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    sample_inputs = spec.training.recipe()(untrained.config, training, None).sample_inputs()
    settings = {"preset": "tiny", "config": untrained.config, "training": {}, "step": 1, "metrics": {}}
    save_checkpoint(folder, spec, module, sample_inputs=sample_inputs, **settings)


@pytest.fixture
def without_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPWAY_VLLM_VENV", str(tmp_path / "none"))


@pytest.fixture
def run(tmp_path: Path, without_vllm: None, adapted: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run export.all for vLLM into a repository of this test; gives the exit status and the cells."""

    def call(*arguments: str, source: Path = adapted) -> tuple[int, list[Any]]:
        capfd.readouterr()
        places = ["--checkpoints", str(source), "--repository", str(tmp_path / "repository"), "--json"]
        status = export_all.main(["--target", "vllm", *arguments, *places])
        printed = capfd.readouterr()
        assert "Traceback" not in printed.err
        # Whatever a library has to say, it does not say it in between: all that is printed is JSON.
        return status, json.loads(printed.out)["cells"] if printed.out else []

    return call


@pytest.fixture(scope="session")
def quantized(adapted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with both models in AWQ, without vLLM; tests copy what they change."""
    require_llmcompressor()
    repository = tmp_path_factory.mktemp("quantized") / "repository"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIPWAY_VLLM_VENV", str(repository.parent / "none"))
        models = [argument for model in MODELS for argument in ("--model", model)]
        places = ["--checkpoints", str(adapted), "--repository", str(repository)]
        assert export_all.main(["--target", "vllm", *models, *QUICK, *places]) == 0
    return repository


def source_of(model: str, folder: Path) -> Source:
    spec = find_spec(model)
    return Source(spec, Checkpoint.load(folder / spec.checkpoint))


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_without_vllm_a_checkpoint_is_built_and_held_against_the_original_by_transformers(
    model: str, quantized: Path
) -> None:
    root = find(quantized, f"{model}_vllm_w4a16_awq")
    artifact = Artifact.load(root)
    assert quantized not in root.parents  # what no vLLM has run is not served
    assert artifact.note.startswith("built, not run: expected vLLM")
    assert artifact.note.endswith("run: make vllm; its source is verified in transformers")
    assert (artifact.facts.built, artifact.facts.ran, artifact.facts.compared) == (True, False, False)
    assert artifact.parity["bytes_of_bf16"].value < 0.35
    names = {name.removeprefix("transformers_") for name in artifact.parity}
    assert names > ({"cosine"} if model == "statements" else {"perplexity_ratio", "mean_shift", "next_token"})
    written = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    assert {f"{CHECKPOINT}/{name}" for name in written} < set(artifact.files)
    config = read_json(root / CHECKPOINT / "config.json")
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config["dtype"] == "bfloat16"
    assert read_json(root / ENGINE_FILE)["dtype"] == "bfloat16"


@pytest.mark.slow
def test_packed_numbers_are_what_they_stand_for(quantized: Path) -> None:
    """Unpacked by hand: eight numbers of four bits in an int32, low ones first, (number - zero point) * scale."""
    root = find(quantized, "hallucination_generator_vllm_w4a16_awq")
    stored = load_file(root / CHECKPOINT / "model.safetensors")

    def unpacked(packed: torch.Tensor, axis: int) -> np.ndarray:
        words = packed.numpy().view(np.uint32)
        parts = [(words >> np.uint32(4 * i)) & np.uint32(15) for i in range(8)]
        shape = list(words.shape)
        shape[axis] *= 8
        return np.stack(parts, axis + 1).reshape(shape).astype(int)

    with open_runtime(root, engine="transformers") as runtime:
        for name in ("self_attn.o_proj", "mlp.down_proj", "self_attn.k_proj"):
            layer = f"model.layers.1.{name}"
            numbers = unpacked(stored[f"{layer}.weight_packed"], 1)
            zeros, scales = unpacked(stored[f"{layer}.weight_zero_point"], 0), stored[f"{layer}.weight_scale"].float()
            group = numbers.shape[1] // scales.shape[1]
            weight = (numbers - zeros.repeat(group, 1)) * scales.numpy().repeat(group, 1)
            np.testing.assert_allclose(
                runtime._model.get_parameter(f"{layer}.weight").detach().numpy(), weight, rtol=2**-7, atol=1e-6
            )


def off_by_one(path: Path) -> None:
    """Every zero point of four bits is one more than it was."""
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith("zero_point"):
            words = tensor.numpy().view(np.uint32)
            parts = [np.minimum(((words >> np.uint32(4 * i)) & np.uint32(15)) + 1, 15) for i in range(8)]
            shifted = sum((part.astype(np.uint32) << np.uint32(4 * i) for i, part in enumerate(parts)), np.uint32(0))
            tensors[name] = torch.from_numpy(np.asarray(shifted, np.uint32).view(np.int32))
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "seen"), [("statements", {"cosine"}), ("hallucination_generator", {"mean_shift", "next_token"})]
)
def test_zero_points_off_by_one_fail_the_gate(
    model: str, seen: set[str], quantized: Path, adapted: Path, tmp_path: Path
) -> None:
    import shutil

    root = Path(shutil.copytree(find(quantized, f"{model}_vllm_w4a16_awq"), tmp_path / "off"))
    off_by_one(root / CHECKPOINT / "model.safetensors")
    with open_runtime(root, engine="transformers", verify=False) as runtime:
        checks = parity.check_parity(runtime, source_of(model, adapted), "w4a16_awq")
    assert seen <= {name for name, check in checks.items() if not check.passed}
    with pytest.raises(ParityError, match="not published"):
        parity.require_passed(checks)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_quantized_checkpoint_agrees_with_the_original(model: str, run: Run) -> None:
    """Adapters merged, pooling and projection in the layout of sentence-transformers: equal to 1e-5 in float32."""
    status, (cell,) = run("--model", model, "--precision", "fp32")
    assert (status, cell["status"]) == (0, "ok")
    root = Path(cell["artifact"])
    arguments = read_json(root / ENGINE_FILE)
    assert arguments["dtype"] == "float32"
    assert arguments.get("runner") == ("pooling" if model == "statements" else None)
    assert cell["parity"][next(name for name in cell["parity"] if "difference" in name)] <= 1
    if model == "statements":
        kinds = [module["type"].rpartition(".")[2] for module in read_json(root / CHECKPOINT / "modules.json")]
        assert kinds == ["Transformer", "Pooling", "Dense", "Normalize"]


def test_the_tokenizer_of_a_checkpoint_gives_the_ids_that_the_pipeline_gives(run: Run) -> None:
    """Beside the config of a Qwen2, AutoTokenizer would make one of Qwen2's of it, without a space in front."""
    root = Path(run("--model", "statements", "--precision", "bf16")[1][0]["artifact"])
    config = Artifact.load(root).config
    pipeline = StatementsPipeline(config, root / "assets")
    tokenizer = AutoTokenizer.from_pretrained(root / TOKENIZER)
    for text in ("Let R be a ring.", "  baba codi", "$x$"):
        assert tokenizer(text).input_ids == pipeline.encode([{"text": text}])["input_ids"][0].tolist()
    beside_config = AutoTokenizer.from_pretrained(root / CHECKPOINT)
    assert beside_config("Let R").input_ids != tokenizer("Let R").input_ids, "no need for a folder of its own any more"


@pytest.mark.slow
def test_other_texts_make_another_checkpoint_and_the_same_do_not(run: Run, tmp_path: Path) -> None:
    require_llmcompressor()
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"Let R be ring number {i}."}) + "\n" for i in range(8)))
    arguments = ["--model", "statements", "--precision", "w8a16_gptq", *QUICK]
    assert run(*arguments)[1][0]["status"] == "ok"
    assert run(*arguments)[1][0]["status"] == "reused"
    (cell,) = run(*arguments, "--calibration", str(texts))[1]
    assert cell["status"] == "ok"
    assert Artifact.load(Path(cell["artifact"])).built_with["scheme"].endswith("in 8 texts")
    assert run(*arguments, "--calibration", str(texts))[1][0]["status"] == "reused"
    texts.write_text(texts.read_text().replace("ring", "field"))
    assert run(*arguments, "--calibration", str(texts))[1][0]["status"] == "ok"


@pytest.fixture
def with_vllm() -> None:
    try:
        find_python()
    except MissingPackage as error:
        pytest.skip(str(error))


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_vllm_agrees_with_the_original(
    model: str, with_vllm: None, adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require_llmcompressor()
    repository = tmp_path / "repository"
    arguments = ["--target", "vllm", "--model", model, *QUICK]
    places = ["--checkpoints", str(adapted), "--repository", str(repository), "--json"]
    assert export_all.main([*arguments, *places]) == 0
    (cell,) = json.loads(capsys.readouterr().out)["cells"]
    assert (cell["status"], cell["reason"]) == ("ok", "")
    assert cell["facts"] == {"built": True, "deserialized": True, "ran": True, "compared": True}
    assert [folder.name for folder in repository.iterdir()] == [f"{model}_vllm_w4a16_awq"], "served, without ensemble"
    assert lint(repository) == []


@pytest.mark.parametrize("model", ["policy_gru", "strategy", "hallucination_scorer", "hallucination"])
def test_what_is_no_decoder_is_skipped_with_that_reason(model: str, run: Run) -> None:
    status, (cell,) = run("--model", model)
    assert (status, cell["status"]) == (1, "skipped"), "a named model that is not exported is status 1"
    assert "decoder language model" in cell["reason"] or "export hallucination_generator" in cell["reason"]


def test_an_encoder_as_the_base_is_skipped_with_its_kind(run: Run, tmp_path: Path, checkpoints: Path) -> None:
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    base = based_on(BertModel(BertConfig(vocab_size=1024, **sizes)), tmp_path, checkpoints, "query,key,value")
    status, (cell,) = run("--model", "statements", source=base)
    assert (status, cell["status"]) == (1, "skipped"), "a named model that is not exported is status 1"
    assert cell["reason"].startswith("not a decoder language model: ")
    assert cell["reason"].endswith("is of the kind 'bert'")


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_a_decoder_without_linear_layers_is_refused_in_one_line(run: Run, tmp_path: Path, checkpoints: Path) -> None:
    require_llmcompressor()
    torch.manual_seed(4)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    base = based_on(GPT2Model(GPT2Config(vocab_size=1024, **sizes)), tmp_path, checkpoints, "c_attn")
    status, (cell,) = run("--model", "statements", source=base)
    assert (status, cell["status"]) == (1, "failed")
    assert cell["reason"] == "expected linear layers to quantize, found none in GPT2LMHeadModel"


def based_on(model: Any, tmp_path: Path, checkpoints: Path, targets: str) -> Path:
    """A folder with an untrained checkpoint of `statements` on this base."""
    untrained = Checkpoint.load(checkpoints / "statements")
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_bytes((untrained.assets / "tokenizer.json").read_bytes())
    spec = find_spec("statements")
    config = {**untrained.config, "base": str(tmp_path / "base"), "lora_targets": targets, "max_tokens": 64}
    settings = {"preset": "tiny", "config": config, "training": {}, "step": 1, "metrics": {}}
    sample_inputs = {name: values[:, :64] for name, values in untrained.sample_inputs().items()}
    save_checkpoint(
        tmp_path / "own" / "statements", spec, spec.interface.build(config), sample_inputs=sample_inputs, **settings
    )
    return tmp_path / "own"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected texts to quantize on, found none"),
        ("\n \n", "expected texts to quantize on, found none"),
        ('{"text": "a"}\n{"words": 1}\n', "texts.jsonl:2: expected a JSON object with a 'text', found {'words': 1}"),
        ("no json\n", "texts.jsonl:1: expected a JSON object with a 'text'"),
        (None, "expected a file of calibration texts, found none"),
    ],
)
def test_calibration_texts_that_are_none_are_refused_before_anything_is_done(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "texts.jsonl"
    if content is not None:
        path.write_text(content)
    places = ["--checkpoints", str(tmp_path), "--repository", str(tmp_path / "repository")]
    assert export_all.main(["--target", "vllm", "--calibration", str(path), *places]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "repository").exists()


@pytest.mark.parametrize("option", ["--calibration-samples=0", "--calibration-tokens=1", "--mounted-at=models"])
def test_settings_that_make_no_sense_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert export_all.main(["--target", "vllm", option]) == 2
    assert option.partition("=")[0] in capsys.readouterr().err

"""One command serves every pipeline that generates: its options, its request, its artifact, each error in one line."""

import json
from collections import Counter
from pathlib import Path

import pytest

from runtimes.generate import main
from runtimes.pipeline import all_pipelines
from runtimes.text_pipeline import BatchingPipeline, generating_pipelines

SERVED = [each for each in generating_pipelines().values() if issubclass(each, BatchingPipeline)]


def test_the_pipelines_that_generate_declare_it() -> None:
    assert set(generating_pipelines()) == {"hallucination_aarf", "hnet_step"}
    assert {name for name, each in all_pipelines().items() if each.generates} == {"hallucination_aarf"}


def test_no_option_belongs_to_two_pipelines() -> None:
    counted = Counter(option.name for each in generating_pipelines().values() for option in each.generation_options)
    assert counted.most_common(1)[0][1] == 1


@pytest.mark.parametrize("model", ["hallucination_aarf", "hnet", "hnet_step", "HNet"])
def test_an_example_needs_no_artifact(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([model, "--example", "--repository", str(tmp_path)]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)


@pytest.mark.parametrize("pipeline", SERVED)
def test_a_served_model_has_the_same_name_with_and_without_the_suffix(pipeline: type[BatchingPipeline]) -> None:
    assert pipeline.served_name("mine") == pipeline.served_name(f"mine{pipeline.name_suffix}")
    assert pipeline.served_name("mine") == f"mine{pipeline.served_suffix}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: MODEL"),
        (["hnet", "hnet_step"], "expected one MODEL, found hnet, hnet_step"),
        (["hnat", "--text", "a"], "expected a known model that generates, found 'hnat'; did you mean 'hnet'?"),
        (["hnet", "--text", "a"], "publish it: python -m export.all hnet_step --target onnx"),
        (
            ["hnet", "--text", "a", "--target", "OpenVINO"],
            "python -m export.all hnet_step --target openvino",
        ),
        (["hallucination_aarf"], "publish it: python -m export.all hallucination_aarf --target torch"),
        (
            ["hnet", "--example", "--tau", "3"],
            "expected options of hnet (--text, --max-bytes, --temperature, ",
        ),
        (["hallucination_aarf", "--example", "--seed", "1"], "found --seed"),
        (
            ["hallucination_aarf", "--url", "127.0.0.1:1", "--input", "{request}"],
            "--url: expected a model that ",
        ),
        (["hnet", "--url", "127.0.0.1:1"], "expected --text TEXT or --input FILE, found neither"),
        (["hnet", "--url", "127.0.0.1:1", "--text", "a", "--max-bytes", "0"], "max_bytes: expected a whole number"),
        (["hnet", "--url", "127.0.0.1:1", "--input", "nowhere.json"], "nowhere.json: expected a readable file"),
    ],
)
def test_a_wrong_command_line_is_an_error_with_a_remedy(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = tmp_path / "request.json"
    request.write_text('{"prompt": "a"}')
    given = [argument.replace("{request}", str(request)) for argument in arguments]
    assert main([*given, "--repository", str(tmp_path / "model_repository")]) == 2
    assert message in capsys.readouterr().err


def test_an_unreachable_server_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hnet", "--url", "127.0.0.1:1", "--text", "a"]) == 1
    assert "127.0.0.1:1" in capsys.readouterr().err

"""config.pbtxt describes the artifact in Triton's own schema, and equals what version 0.1 published."""

import dataclasses
from pathlib import Path

import pytest
from google.protobuf import json_format
from tritonclient.grpc import model_config_pb2 as schema

from export.triton import backends
from export.triton.config import ensemble_config, model_config, step_config, writer_config
from export.triton.scheduling import Scheduling
from export.triton.schema import CONFIG, has_config, message, read_config, to_text
from runtimes import plugins
from runtimes.artifact import Artifact
from runtimes.errors import ArtifactError, InputError
from tests import toys


@pytest.fixture
def doubling(tmp_path: Path) -> Artifact:
    return toys.make(tmp_path, toys.DOUBLING)


@pytest.fixture
def running(tmp_path: Path) -> Artifact:
    return toys.make(tmp_path, toys.RUNNING)


def test_a_stateless_model_is_batched_and_warmed_up(doubling: Artifact) -> None:
    config = model_config(doubling, "onnxruntime")
    assert (config.name, config.backend, config.max_batch_size) == ("doubling_onnx", "onnxruntime", 8)
    assert [(each.name, list(each.dims)) for each in config.input] == [("x", [-1, 3])]
    assert config.HasField("dynamic_batching")
    assert not config.dynamic_batching.HasField("default_queue_policy")  # makes Triton 2.51 stall for 500 ms
    assert [warmup.batch_size for warmup in config.model_warmup] == [1, 2, 8]
    assert list(config.model_warmup[0].inputs["x"].dims) == [4, 3]  # no -1: time at its opt
    assert not config.HasField("sequence_batching")


def test_one_number_per_row_is_reshaped(doubling: Artifact) -> None:
    total = model_config(doubling, "onnxruntime").output[1]
    assert (total.name, list(total.dims), total.HasField("reshape"), list(total.reshape.shape)) == (
        "total",
        [1],
        True,
        [],
    )


def test_triton_keeps_the_state_of_a_recurrent_model_and_no_client_sees_it(running: Artifact) -> None:
    config = model_config(running, "onnxruntime")
    assert ([each.name for each in config.input], [each.name for each in config.output]) == (["x"], ["y"])
    (state,) = config.sequence_batching.state
    assert (state.input_name, state.output_name, list(state.dims)) == ("h", "h_next", [3])
    assert state.initial_state[0].zero_data
    assert not config.sequence_batching.control_input  # a declared control must be an input of the graph
    assert not config.model_warmup
    assert not config.HasField("dynamic_batching")


def test_a_tensorrt_engine_runs_on_the_gpu(doubling: Artifact) -> None:
    config = model_config(doubling, "tensorrt")
    assert (config.platform, config.backend) == ("tensorrt_plan", "")
    assert config.instance_group[0].kind == schema.ModelInstanceGroup.KIND_GPU


def test_an_onnx_model_runs_where_it_was_built_for(doubling: Artifact) -> None:
    for_gpu = dataclasses.replace(doubling, built_with={"gpu": "sm_90"})
    assert model_config(doubling, "onnxruntime").instance_group[0].kind == schema.ModelInstanceGroup.KIND_CPU
    assert model_config(for_gpu, "onnxruntime").instance_group[0].kind == schema.ModelInstanceGroup.KIND_GPU


@pytest.mark.parametrize(("task", "more"), [("generate", set()), ("embed", {"embedding_request"})])
def test_vllm_takes_text_and_streams_its_answer(doubling: Artifact, task: str, more: set[str]) -> None:
    """As NVIDIA's vllm backend completes its own config."""
    config = model_config(dataclasses.replace(doubling, built_with={"task": task}), "vllm")
    assert (config.backend, config.max_batch_size) == ("vllm", 0)
    assert config.model_transaction_policy.decoupled
    assert config.instance_group[0].kind == schema.ModelInstanceGroup.KIND_MODEL
    required = [each.name for each in config.input if not each.optional]
    optional = {each.name for each in config.input if each.optional}
    assert required == ["text_input"]
    assert {"stream", "sampling_parameters", "exclude_input_in_output"} | more <= optional
    assert {"embedding_request"} & optional == more
    assert (config.output[0].name, config.output[0].data_type) == ("text_output", schema.TYPE_STRING)


def test_a_backend_that_triton_lacks_is_refused(doubling: Artifact) -> None:
    with pytest.raises(ArtifactError, match=r"expected a Triton backend of onnxruntime.*found 'torch'"):
        model_config(doubling, "torch")


def test_a_backend_is_a_file_in_a_folder(doubling: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "from export.triton.backend import Backend\nBACKEND = Backend(name='summing', file='sums.bin')\n"
    (tmp_path / "summing.py").write_text(source)
    monkeypatch.setattr(backends, "__path__", [*backends.__path__, str(tmp_path)])
    assert model_config(doubling, "summing").backend == "summing"


@pytest.mark.parametrize("name", plugins.names("export.triton.backends"))
def test_every_backend_has_the_name_of_its_file_and_of_an_engine(name: str) -> None:
    assert plugins.load("export.triton.backends", name, "BACKEND").name == name
    assert name in plugins.names("runtimes.engines")


def test_the_ensemble_leads_from_request_to_answer(running: Artifact) -> None:
    numbers = {"running_onnx": 7, "running_encode": 2, "running_decode": 3}
    ensemble = ensemble_config(running, numbers)
    steps = ensemble.ensemble_scheduling.step
    found = [(step.model_name, step.model_version) for step in steps]
    assert found == [("running_encode", 2), ("running_onnx", 7), ("running_decode", 3)]
    assert dict(steps[1].input_map) == {"x": "x"}  # not the state
    assert (ensemble.input[0].name, ensemble.output[0].name) == ("request", "answer")


@pytest.mark.parametrize("step", ["encode", "decode"])
def test_a_step_has_its_name_as_a_parameter(doubling: Artifact, step: str) -> None:
    config = step_config(doubling, step)
    assert (config.name, config.backend) == (f"doubling_{step}", "python")
    assert config.parameters["step"].string_value == step


def test_a_config_is_written_and_read_in_the_text_format_of_protobuf(tmp_path: Path) -> None:
    config = message({"name": 'a "b"', "dynamic_batching": {}, "instance_group": [{"kind": "KIND_CPU", "count": 2}]})
    (tmp_path / CONFIG).write_text(to_text(config))
    assert read_config(tmp_path) == config
    assert config.HasField("dynamic_batching")
    assert not message({"name": "a"}).HasField("dynamic_batching")


@pytest.mark.parametrize("wrong", [{"nme": "a"}, {"max_batch_size": "many"}, {"instance_group": [{"kind": "KIND_X"}]}])
def test_a_field_or_value_that_the_schema_lacks_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(json_format.ParseError):
        message(wrong)


PUBLISHED = Path(__file__).parent / "configs_0_1"  # as version 0.1 wrote them


def configs_now(doubling: Artifact, running: Artifact) -> dict[str, schema.ModelConfig]:
    limited = Scheduling(instances=3, queue=64, timeout_ms=250)
    on_gpu = dataclasses.replace(doubling, built_with={"gpu": "sm_90"})
    generator, embedder = (dataclasses.replace(doubling, built_with={"task": task}) for task in ("generate", "embed"))
    numbers = {"running_onnx": 7, "running_encode": 2, "running_decode": 3}
    return {
        "onnxruntime": model_config(doubling, "onnxruntime"),
        "onnxruntime_limited": model_config(doubling, "onnxruntime", limited, 1),
        "onnxruntime_gpu": model_config(on_gpu, "onnxruntime"),
        "onnxruntime_recurrent": model_config(running, "onnxruntime"),
        "openvino": model_config(doubling, "openvino"),
        "tensorrt": model_config(doubling, "tensorrt"),
        "vllm_generate": model_config(generator, "vllm"),
        "vllm_embed_limited": model_config(embedder, "vllm", limited),
        "encode": step_config(doubling, "encode"),
        "decode_limited": step_config(doubling, "decode", limited),
        "encode_recurrent": step_config(running, "encode"),
        "writer": writer_config(doubling, "writes"),
        "writer_limited": writer_config(doubling, "writes", limited),
        "ensemble": ensemble_config(running, numbers),
    }


def test_every_config_equals_that_of_version_0_1(doubling: Artifact, running: Artifact, tmp_path: Path) -> None:
    configs = configs_now(doubling, running)
    assert configs.keys() == {path.stem for path in PUBLISHED.iterdir()}
    for name, config in configs.items():
        model = tmp_path / name
        model.mkdir()
        (model / CONFIG).write_text((PUBLISHED / f"{name}.pbtxt").read_text())
        assert read_config(model) == config, name
        assert has_config(model, config)
        config.max_batch_size += 1
        assert not has_config(model, config)


def test_limits_on_waiting_are_the_batchers_queue_policy(doubling: Artifact, running: Artifact) -> None:
    limited = Scheduling(instances=3, queue=64, timeout_ms=250)
    config = model_config(doubling, "onnxruntime", limited)
    policy = config.dynamic_batching.default_queue_policy
    assert (policy.max_queue_size, policy.default_timeout_microseconds) == (64, 250_000)
    assert policy.timeout_action == schema.ModelQueuePolicy.REJECT
    assert config.instance_group[0].count == 3
    recurrent = model_config(running, "onnxruntime", limited)  # Triton has no such limits for sequences
    assert recurrent.instance_group[0].count == 1
    assert recurrent.HasField("sequence_batching")


def test_a_model_with_its_own_queue_has_the_limits_as_parameters(doubling: Artifact) -> None:
    limited = Scheduling(instances=2, queue=64, timeout_ms=250)
    generator = dataclasses.replace(doubling, built_with={"task": "generate"})
    for text in (writer_config(doubling, "writes", limited), model_config(generator, "vllm", limited)):
        found = {name: value.string_value for name, value in text.parameters.items()}
        assert {"max_queue_size": "64", "queue_timeout_ms": "250"}.items() <= found.items()
        assert text.instance_group[0].count == 1
    for text in (writer_config(doubling, "writes"), model_config(generator, "vllm")):
        assert "max_queue_size" not in text.parameters


@pytest.mark.parametrize("step", ["encode", "decode"])
def test_the_steps_have_the_limits_of_their_model(doubling: Artifact, running: Artifact, step: str) -> None:
    limited = Scheduling(instances=3, queue=64, timeout_ms=250)
    config = step_config(doubling, step, limited)
    policy = config.dynamic_batching.default_queue_policy
    assert (policy.max_queue_size, policy.default_timeout_microseconds) == (64, 250_000)
    assert list(config.dynamic_batching.preferred_batch_size) == [1]
    assert config.instance_group[0].count == 3
    for free in (step_config(doubling, step), step_config(doubling, step, Scheduling(instances=3))):
        assert not free.HasField("dynamic_batching")
    recurrent = step_config(running, step, limited)
    assert not recurrent.HasField("dynamic_batching")
    assert recurrent.instance_group[0].count == 1


@pytest.mark.parametrize(
    "wrong", [{"instances": 0}, {"queue": -1}, {"timeout_ms": -1}, {"queue": 4}, {"timeout_ms": 4}]
)
def test_limits_with_which_triton_stalls_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError):
        Scheduling(**wrong)

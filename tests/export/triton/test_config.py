"""config.pbtxt says what the artifact is, in words that Triton's own schema accepts."""

import dataclasses
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as schema

from export.triton.config import Scheduling, Word, ensemble_config, model_config, render, step_config, writer_config
from runtimes.artifact import Artifact
from runtimes.errors import ArtifactError, InputError
from tests import toys


def parsed(text: str) -> schema.ModelConfig:
    return text_format.Parse(text, schema.ModelConfig())


@pytest.fixture
def doubling(tmp_path: Path) -> Artifact:
    return toys.make(tmp_path, toys.DOUBLING)


@pytest.fixture
def running(tmp_path: Path) -> Artifact:
    return toys.make(tmp_path, toys.RUNNING)


def test_a_stateless_model_is_batched_and_warmed_up(doubling: Artifact) -> None:
    config = parsed(model_config(doubling, "onnxruntime"))
    assert (config.name, config.backend, config.max_batch_size) == ("doubling_onnx", "onnxruntime", 8)
    assert [(each.name, list(each.dims)) for each in config.input] == [("x", [-1, 3])]
    assert config.HasField("dynamic_batching")
    assert not config.dynamic_batching.HasField("default_queue_policy")  # makes Triton 2.51 stall for 500 ms
    assert [warmup.batch_size for warmup in config.model_warmup] == [1, 2, 8]
    assert list(config.model_warmup[0].inputs["x"].dims) == [4, 3]  # no -1: time at its opt
    assert not config.HasField("sequence_batching")


def test_one_number_per_row_is_reshaped(doubling: Artifact) -> None:
    total = parsed(model_config(doubling, "onnxruntime")).output[1]
    assert (total.name, list(total.dims), total.HasField("reshape"), list(total.reshape.shape)) == (
        "total",
        [1],
        True,
        [],
    )


def test_the_state_of_a_recurrent_model_is_kept_by_triton_and_seen_by_nobody(running: Artifact) -> None:
    config = parsed(model_config(running, "onnxruntime"))
    assert ([each.name for each in config.input], [each.name for each in config.output]) == (["x"], ["y"])
    (state,) = config.sequence_batching.state
    assert (state.input_name, state.output_name, list(state.dims)) == ("h", "h_next", [3])
    assert state.initial_state[0].zero_data
    assert not config.sequence_batching.control_input  # a declared control must be an input of the graph
    assert not config.model_warmup
    assert not config.HasField("dynamic_batching")


def test_a_tensorrt_engine_runs_on_the_gpu(doubling: Artifact) -> None:
    config = parsed(model_config(doubling, "tensorrt"))
    assert (config.platform, config.backend) == ("tensorrt_plan", "")
    assert config.instance_group[0].kind == schema.ModelInstanceGroup.KIND_GPU


def test_an_onnx_model_runs_where_it_was_built_for(doubling: Artifact) -> None:
    for_gpu = dataclasses.replace(doubling, built_with={"gpu": "sm_90"})
    assert parsed(model_config(doubling, "onnxruntime")).instance_group[0].kind == schema.ModelInstanceGroup.KIND_CPU
    assert parsed(model_config(for_gpu, "onnxruntime")).instance_group[0].kind == schema.ModelInstanceGroup.KIND_GPU


@pytest.mark.parametrize(("task", "more"), [("generate", set()), ("embed", {"embedding_request"})])
def test_vllm_takes_text_and_sends_what_it_writes_piece_by_piece(doubling: Artifact, task: str, more: set[str]) -> None:
    """As NVIDIA's vllm backend completes its own config."""
    config = parsed(model_config(dataclasses.replace(doubling, built_with={"task": task}), "vllm"))
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


def test_the_ensemble_leads_from_request_to_answer(running: Artifact) -> None:
    numbers = {"running_onnx": 7, "running_encode": 2, "running_decode": 3}
    ensemble = parsed(ensemble_config(running, numbers))
    steps = ensemble.ensemble_scheduling.step
    found = [(step.model_name, step.model_version) for step in steps]
    assert found == [("running_encode", 2), ("running_onnx", 7), ("running_decode", 3)]
    assert dict(steps[1].input_map) == {"x": "x"}  # not the state
    assert (ensemble.input[0].name, ensemble.output[0].name) == ("request", "answer")


@pytest.mark.parametrize("step", ["encode", "decode"])
def test_a_step_knows_which_one_it_is(doubling: Artifact, step: str) -> None:
    config = parsed(step_config(doubling, step))
    assert (config.name, config.backend) == (f"doubling_{step}", "python")
    assert config.parameters["step"].string_value == step


def test_text_is_quoted_and_words_are_not() -> None:
    assert (
        render({"name": 'a "b"', "kind": Word("KIND_CPU"), "on": True})
        == 'name: "a \\"b\\""\nkind: KIND_CPU\non: true\n'
    )


def test_limits_on_waiting_are_the_batchers_queue_policy(doubling: Artifact, running: Artifact) -> None:
    limited = Scheduling(instances=3, queue=64, timeout_ms=250)
    config = parsed(model_config(doubling, "onnxruntime", limited))
    policy = config.dynamic_batching.default_queue_policy
    assert (policy.max_queue_size, policy.default_timeout_microseconds) == (64, 250_000)
    assert policy.timeout_action == schema.ModelQueuePolicy.REJECT
    assert config.instance_group[0].count == 3
    recurrent = parsed(model_config(running, "onnxruntime", limited))  # Triton has no such limits for sequences
    assert recurrent.instance_group[0].count == 1
    assert recurrent.HasField("sequence_batching")


def test_what_queues_by_itself_is_told_the_limits(doubling: Artifact) -> None:
    limited = Scheduling(instances=2, queue=64, timeout_ms=250)
    generator = dataclasses.replace(doubling, built_with={"task": "generate"})
    for text in (writer_config(doubling, "writes", limited), model_config(generator, "vllm", limited)):
        found = {name: value.string_value for name, value in parsed(text).parameters.items()}
        assert {"max_queue_size": "64", "queue_timeout_ms": "250"}.items() <= found.items()
        assert parsed(text).instance_group[0].count == 1
    for text in (writer_config(doubling, "writes"), model_config(generator, "vllm")):
        assert "max_queue_size" not in parsed(text).parameters


@pytest.mark.parametrize("step", ["encode", "decode"])
def test_the_steps_have_the_limits_of_their_model(doubling: Artifact, running: Artifact, step: str) -> None:
    limited = Scheduling(instances=3, queue=64, timeout_ms=250)
    config = parsed(step_config(doubling, step, limited))
    policy = config.dynamic_batching.default_queue_policy
    assert (policy.max_queue_size, policy.default_timeout_microseconds) == (64, 250_000)
    assert list(config.dynamic_batching.preferred_batch_size) == [1]
    assert config.instance_group[0].count == 3
    for free in (step_config(doubling, step), step_config(doubling, step, Scheduling(instances=3))):
        assert not parsed(free).HasField("dynamic_batching")
    recurrent = parsed(step_config(running, step, limited))
    assert not recurrent.HasField("dynamic_batching")
    assert recurrent.instance_group[0].count == 1


@pytest.mark.parametrize(
    "wrong", [{"instances": 0}, {"queue": -1}, {"timeout_ms": -1}, {"queue": 4}, {"timeout_ms": 4}]
)
def test_limits_with_which_triton_stalls_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError):
        Scheduling(**wrong)

"""Checks a model repository without a server: every config against its artifact."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from export.triton.backend import backend_of, find_backend
from export.triton.config import ANSWER, REQUEST, STEPS, WRITE
from export.triton.schema import TYPES, ModelConfig, dims, read_config, schema
from runtimes.artifact import MANIFEST, Artifact, read_json, verify_digests
from runtimes.errors import SlipwayError, one_line
from runtimes.pipeline import Schema, find_pipeline, open_pipeline
from runtimes.repository import REQUEST_SCHEMA, STEP_FILE, number_of, versions
from runtimes.tensors import BATCH, TensorSpec
from runtimes.text_pipeline import BatchingPipeline

TEXT = ("TYPE_STRING", (1,))

Kind = tuple[str, tuple[int, ...]]  # data type, dims without the batch
Configs = Mapping[str, ModelConfig]


def lint(repository: Path, mounted_at: Path | None = None) -> list[str]:
    """One line for each fault of the repository, "model: expected X, found Y".

    `mounted_at` is the repository's path on the server that reads it, if that is another.
    """
    problems: list[str] = []
    configs: dict[str, ModelConfig] = {}
    for folder in sorted(path for path in repository.iterdir() if path.is_dir()):
        try:
            configs[folder.name] = read_config(folder)
        except SlipwayError as error:
            problems.append(f"{folder.name}: {error}")
    for name, config in configs.items():
        found = _check(repository / name, config, configs, repository if mounted_at is None else mounted_at)
        problems += (f"{name}: {problem}" for problem in found)
    return problems


def _check(model: Path, config: ModelConfig, configs: Configs, mounted_at: Path) -> Iterator[str]:
    if config.name not in ("", model.name):
        yield f"expected the name of its folder, found '{config.name}'"
    present = versions(model)
    if not present:
        yield "expected a version folder, found none"
    elif config.platform == "ensemble":
        yield from _check_ensemble(model, config, configs)
    elif config.backend == "python":
        for version in loaded(present, config):
            yield from _check_step(version, config)
    else:
        yield from _check_versions(present, config, mounted_at)


def loaded(present: list[Path], config: ModelConfig) -> list[Path]:
    """The versions that Triton loads of those there are."""
    return present[-(config.version_policy.latest.num_versions or 1) :]


def _check_versions(present: list[Path], config: ModelConfig, mounted_at: Path) -> Iterator[str]:
    """Faults of all versions: each has its files, and those that Triton loads fit the config."""
    for version in present:
        try:
            artifact = Artifact.load(version)
            artifact.verify_files(version)
        except SlipwayError as error:
            yield f"version {version.name}: {error}"
            continue
        if artifact.name != version.parent.name:
            yield f"version {version.name}: expected artifact {version.parent.name}, found {artifact.name}"
        if version in loaded(present, config):
            yield from _check_backend(version, artifact, config)
            backend = find_backend(artifact.runtime)
            if backend and backend.check:
                on_server = mounted_at.absolute() / artifact.name / version.name
                yield from backend.check(version, artifact, config, on_server)
            else:
                yield from _check_interface(artifact, config)
                yield from _check_state(artifact, config)


def _check_backend(version: Path, artifact: Artifact, config: ModelConfig) -> Iterator[str]:
    name = backend_of(config)
    if name != artifact.runtime:
        yield f"expected backend '{artifact.runtime}', found '{name}'"
    backend = find_backend(name)
    file = config.default_model_filename or (backend.file if backend else "")
    if file not in artifact.files:
        yield f"version {version.name}: expected {file or 'a known backend'} in its manifest, found none"


def _check_interface(artifact: Artifact, config: ModelConfig) -> Iterator[str]:
    yield from _check_batch(artifact, config)
    yield from _compare("input", kinds(artifact.signature.free_inputs), declared(config.input))
    yield from _compare("output", kinds(artifact.signature.visible_outputs), declared(config.output))


def _check_batch(artifact: Artifact, config: ModelConfig) -> Iterator[str]:
    verified = artifact.signature.axis(BATCH).max
    if config.max_batch_size != verified:
        yield f"expected max_batch_size {verified}, for which the artifact was verified, found {config.max_batch_size}"


def _check_state(artifact: Artifact, config: ModelConfig) -> Iterator[str]:
    specs = {spec.name: spec for spec in artifact.signature.inputs}
    expected = {source: (result, *kind(specs[source])) for source, result in artifact.signature.state}
    states = config.sequence_batching.state
    found = {each.input_name: (each.output_name, _type(each.data_type), tuple(each.dims)) for each in states}
    yield from _compare("state", expected, found)
    for each in states:
        if not (len(each.initial_state) == 1 and each.initial_state[0].zero_data):
            yield f"state '{each.input_name}': expected zeros as its initial state, found something else"


def _check_step(version: Path, config: ModelConfig) -> Iterator[str]:
    """Faults of a Python step: it is ours, has its files, and has the tensors of its artifact."""
    step = config.parameters["step"].string_value if "step" in config.parameters else ""
    if step not in (*STEPS, WRITE):
        yield f"expected parameter step of {', '.join((*STEPS, WRITE))}, found '{step}'"
        return
    if not (version / STEP_FILE).is_file():
        yield f"version {version.name}: expected {STEP_FILE}, found none"
    try:
        artifact = Artifact.load(version)
        verify_digests(version, artifact.files if step == WRITE else artifact.assets)
        find_pipeline(artifact.pipeline)
    except SlipwayError as error:
        yield f"version {version.name}: {error}"
        return
    if step == WRITE:
        yield from _check_writer(version, artifact, config)
        return
    yield from _check_batch(artifact, config)
    given, returned = kinds(artifact.signature.free_inputs), kinds(artifact.signature.visible_outputs)
    yield from _compare("input", {REQUEST: TEXT} if step == "encode" else returned, declared(config.input))
    yield from _compare("output", given if step == "encode" else {ANSWER: TEXT}, declared(config.output))


def _check_writer(version: Path, artifact: Artifact, config: ModelConfig) -> Iterator[str]:
    """One request in, many answers out; the artifact is a step."""
    pipeline = find_pipeline(artifact.pipeline)
    if issubclass(pipeline, BatchingPipeline):
        yield from _check_schema(version, pipeline.generation_schema)
    else:
        yield f"expected an artifact that generates texts in batches, found {artifact.name}"
    if not config.model_transaction_policy.decoupled:
        yield "expected a decoupled model_transaction_policy, found none; one request has many answers"
    if config.max_batch_size:
        yield f"expected max_batch_size 0, for it makes its own batches, found {config.max_batch_size}"
    yield from _compare("input", {REQUEST: TEXT}, declared(config.input))
    yield from _compare("output", {ANSWER: TEXT}, declared(config.output))


def _check_ensemble(model: Path, config: ModelConfig, configs: Configs) -> Iterator[str]:
    """Faults of an ensemble: a step reads tensors of the request or of a step before it, in their type and dims."""
    known = declared(config.input)
    for step in config.ensemble_scheduling.step:
        if step.model_name not in configs:
            yield f"step '{step.model_name}': expected a model in the repository, found none"
            continue
        called = configs[step.model_name]
        newest = max(map(number_of, versions(model.parent / step.model_name)), default=-1)
        if step.model_version not in (-1, newest):  # -1, the newest, is of an earlier export
            found = f"expected version {newest}, the newest, found {step.model_version}"
            yield f"step '{step.model_name}': {found}; publish the ensemble again"
        if called.max_batch_size < config.max_batch_size:
            sizes = f"expected max_batch_size {config.max_batch_size}, found {called.max_batch_size}"
            yield f"step '{step.model_name}': {sizes}"
        needed, made = declared(called.input), declared(called.output)
        read = {key: known[value] for key, value in step.input_map.items() if value in known}
        yield from (f"step '{step.model_name}': {line}" for line in _compare("input", needed, read))
        for key in step.output_map.keys() - made.keys():
            yield f"step '{step.model_name}': expected outputs {', '.join(made)}, found '{key}'"
        known |= {value: made[key] for key, value in step.output_map.items() if key in made}
    final = {name: known[name] for name in declared(config.output) if name in known}
    yield from _compare("output", declared(config.output), final)
    names = [step.model_name for step in config.ensemble_scheduling.step]
    yield from _check_keys(model.parent, names)
    for encode in [version for name in names[:1] for version in versions(model.parent / name)[-1:]]:
        with suppress(SlipwayError):  # the step itself has a line
            artifact = Artifact.load(encode)
            verify_digests(encode, artifact.assets)
            yield from _check_schema(versions(model)[-1], open_pipeline(artifact, encode).schema())


def _check_schema(version: Path, expected: Schema) -> Iterator[str]:
    """The schema in a version is that of the pipeline which reads the requests."""
    try:
        if read_json(version / REQUEST_SCHEMA) == expected:
            return
        found = "another"
    except SlipwayError as error:
        found = one_line(error)
    yield f"version {version.name}: expected the schema of its requests, found {found}; publish the ensemble again"


def _check_keys(repository: Path, names: list[str]) -> Iterator[str]:
    """All steps belong to the artifact that is served, not to an earlier one."""
    newest = [present[-1] for present in (versions(repository / name) for name in names) if present]
    keys = {Artifact.load(version).key for version in newest if (version / MANIFEST).is_file()}
    if len(keys) > 1:
        yield f"expected steps made for one artifact, found {len(keys)} keys; publish the ensemble again"


def _compare(what: str, expected: Mapping[str, object], found: Mapping[str, object]) -> Iterator[str]:
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            yield f"{what} '{name}': expected {_show(expected.get(name))}, found {_show(found.get(name))}"


def declared(tensors: Iterable[Any]) -> dict[str, Kind]:
    """The type and dims of a config's inputs or outputs, by name, as the model behind Triton has them."""
    return {
        each.name: (_type(each.data_type), tuple(each.reshape.shape if each.HasField("reshape") else each.dims))
        for each in tensors
    }


def kinds(specs: Iterable[TensorSpec]) -> dict[str, Kind]:
    return {spec.name: kind(spec) for spec in specs}


def kind(spec: TensorSpec) -> Kind:
    """A tensor's type in Triton, and its dims without the batch."""
    return TYPES[spec.dtype], tuple(dims(spec))


def _type(number: int) -> str:
    return str(schema().DataType.Name(number))


def _show(kind: object) -> str:
    return "nothing" if kind is None else " ".join(map(str, kind)) if isinstance(kind, tuple) else str(kind)

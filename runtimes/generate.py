"""Continue a prompt with a model that generates, in this process or by a server: python -m runtimes.generate MODEL"""

import argparse
import json
import sys
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.artifact import Artifact, artifact_name, require_plain
from runtimes.errors import EngineError, InputError, one_line
from runtimes.host.cli import (
    command,
    device_arguments,
    input_arguments,
    json_argument,
    models_argument,
    parser,
    read_input,
    repository_argument,
    unknown_name,
)
from runtimes.pipeline import open_pipeline, parse_request
from runtimes.repository import newest, published
from runtimes.runtime import open_runtime
from runtimes.text_pipeline import BatchingPipeline, GeneratingPipeline, Option, Piece, generating_pipelines
from runtimes.triton.client import CLIENTS


@command
def main(argv: list[str] | None = None) -> int:
    """Print the generated text as it arrives, or with --json each piece as JSON on a line."""
    arguments = _parser().parse_args(argv)
    root = _artifact(arguments)
    pipeline = _pipeline(arguments, root)
    options = _own_options(pipeline, arguments)
    if arguments.example:
        print(json.dumps(pipeline.generation_example(), ensure_ascii=False, indent=1))
        return 0
    given = parse_request(read_input(arguments.input), str(arguments.input)) if arguments.input else None
    request = pipeline.generation_request(given, options)
    pieces = _from_server(pipeline, arguments, request) if arguments.url else _from_artifact(root, arguments, request,
                                                                                            options)  # fmt: skip
    as_text = pipeline.prints_text and not arguments.json
    with closing(pieces):
        for each in pieces:
            print(each["text"] if as_text else json.dumps(each, ensure_ascii=False), end="" if as_text else "\n",
                  flush=True)  # fmt: skip
    if as_text:
        print()
    return 0


def _artifact(arguments: argparse.Namespace) -> Path | None:
    """The newest artifact of the model, or of that name with a suffix, whose pipeline generates; None without one."""
    for name, pipeline in generating_pipelines().items():
        target = arguments.target or pipeline.generation_target
        for model in dict.fromkeys((arguments.model, arguments.model + pipeline.name_suffix)):
            root = newest(arguments.repository, artifact_name(model, target, arguments.precision))
            if root is not None and Artifact.load(root).pipeline == name:
                return root
    return None


def _pipeline(arguments: argparse.Namespace, root: Path | None) -> type[GeneratingPipeline]:
    """The pipeline of the artifact; without one the pipeline of the model's name, or the only one that Triton serves.

    `InputError` where neither exists, or where an artifact is needed and missing.
    """
    known = generating_pipelines()
    if root is not None:
        return known[Artifact.load(root).pipeline]
    of_name = [each for name, each in known.items() if arguments.model in (name, name.removesuffix(each.name_suffix))]
    served = [each for each in known.values() if issubclass(each, BatchingPipeline)]
    if of_name and (arguments.example or arguments.url):
        return of_name[0]
    if arguments.url and len(served) == 1:
        return served[0]
    if of_name:
        model = next(name for name, each in known.items() if each is of_name[0])
        target = arguments.target or of_name[0].generation_target
        raise InputError(
            f"expected an artifact of {model} for {target} in {arguments.repository}, found none; "
            f"publish it: python -m export.all {model} --target {target}"
        )
    names = [name.removesuffix(each.name_suffix) for name, each in known.items()]
    if any(Artifact.load(each).model == arguments.model for each in published(arguments.repository)):
        raise InputError(f"expected a model that generates ({', '.join(names)}), found {arguments.model}")
    raise unknown_name("model that generates", arguments.model, names, "publish it: python -m export.all MODEL")


def _own_options(pipeline: type[GeneratingPipeline], arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of the pipeline that were given; `InputError` for one that only another pipeline has."""
    own = {option.name for option in pipeline.generation_options}
    all_options = {option.name for each in generating_pipelines().values() for option in each.generation_options}
    given = {name: value for name, value in vars(arguments).items() if name in all_options}
    for name in given.keys() - own:
        expected = ", ".join(_flag(option) for option in pipeline.generation_options)
        raise InputError(f"expected options of {arguments.model} ({expected}), found --{name.replace('_', '-')}")
    return given


def _from_artifact(
    root: Path | None, arguments: argparse.Namespace, request: Any, options: Mapping[str, Any]
) -> Generator[Piece]:
    """The pieces that an artifact generates in this process."""
    assert root is not None, "the pipeline was found without an artifact"
    with open_runtime(root, device=arguments.device, threads=arguments.threads) as runtime:
        pipeline = open_pipeline(runtime.artifact, root)
        assert isinstance(pipeline, GeneratingPipeline)
        yield from pipeline.generate(runtime, request, options)


def _from_server(pipeline: type[GeneratingPipeline], arguments: argparse.Namespace, request: Any) -> Generator[Piece]:
    """The pieces that a server generates; closing this ends the request there."""
    if not issubclass(pipeline, BatchingPipeline):
        raise InputError(f"--url: expected a model that Triton serves, found {arguments.model}; leave out --url")
    require_plain(arguments.model)
    data = {"request": np.array([json.dumps(request).encode()], np.object_)}
    with closing(CLIENTS["grpc"](arguments.url, 60.0)) as client:
        for response in client.stream(pipeline.served_name(arguments.model), data):
            try:
                piece: Piece = json.loads(response["answer"].item())
            except (KeyError, ValueError) as error:
                raise EngineError(f"{arguments.url}: expected pieces of text, found {one_line(error)}") from error
            yield piece


def _parser() -> argparse.ArgumentParser:
    result = parser(
        "runtimes.generate",
        __doc__.partition(":")[0] + ".",
        *(line for _, pipeline in _by_model() for line in pipeline.generation_commands),
    )
    models = ", ".join(name for name, _ in _by_model())
    models_argument(result, f"model that generates, such as {models}", least=1, most=1)
    input_arguments(result)
    json_argument(result)
    result.add_argument("--url", help="request it of the Triton server at this gRPC HOST:PORT instead of this process")
    targets = ", ".join(f"{pipeline.generation_target} for {name}" for name, pipeline in _by_model())
    result.add_argument("--target", type=str.lower, help=f"target of the artifact (default: {targets})")
    result.add_argument("--precision", type=str.lower, default="fp32", help="of the artifact (default: %(default)s)")
    repository_argument(result)
    device_arguments(result)
    for name, pipeline in _by_model():
        group = result.add_argument_group(f"options of {name}")
        for option in pipeline.generation_options:
            _add(group, option)
    return result


def _by_model() -> Iterator[tuple[str, type[GeneratingPipeline]]]:
    """The pipelines that generate, by the shortest name of their model."""
    for name, pipeline in generating_pipelines().items():
        yield name.removesuffix(pipeline.name_suffix), pipeline


def _add(to: Any, option: Option) -> None:
    """The option; the result has it only if it was given."""
    default = "" if option.default is None else f" (default: {option.default})"
    kind: dict[str, Any] = {"action": "store_true"} if option.kind is bool else {"type": option.kind}
    to.add_argument(_flag(option), default=argparse.SUPPRESS, help=f"{option.meaning}{default}", **kind)


def _flag(option: Option) -> str:
    return f"--{option.name.replace('_', '-')}"


if __name__ == "__main__":
    sys.exit(main())

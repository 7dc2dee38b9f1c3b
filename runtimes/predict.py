"""Answer a request with a published artifact, in this process or by a server: python -m runtimes.predict MODEL"""

import json
import sys
from pathlib import Path
from typing import Any

from runtimes.artifact import Artifact, require_plain
from runtimes.cache.store import Store
from runtimes.errors import InputError
from runtimes.host.cli import (
    command,
    device_arguments,
    input_arguments,
    models_argument,
    parser,
    read_input,
    repository_argument,
)
from runtimes.pipeline import Pipeline, open_pipeline, parse_request, write_answer
from runtimes.repository import find_artifact
from runtimes.runtime import Runtime, open_runtime, serving_engine
from runtimes.triton.client import ask

TARGET, PRECISION = "onnx", "fp32"


@command
def main(argv: list[str] | None = None) -> int:
    """Print the answer as JSON, or with --example a valid request, or with --schema the JSON Schema of requests.

    An answer has the same bytes wherever it was computed.
    """
    arguments = _parser().parse_args(argv)
    if arguments.url and arguments.store:
        raise InputError("--store: expected it without --url, found both; a server answers without a store")
    if arguments.url and not (arguments.target or arguments.example or arguments.schema):
        require_plain(arguments.model)
        print(ask(arguments.url, arguments.model, read_input(arguments.input)).decode())
        return 0
    target, precision = arguments.target or TARGET, arguments.precision or PRECISION
    root = find_artifact(arguments.repository, arguments.model, target, precision)
    artifact = Artifact.load(root)
    if arguments.example or arguments.schema:
        pipeline = open_pipeline(artifact, root)
        print(json.dumps(pipeline.example() if arguments.example else pipeline.schema(), indent=1))
        return 0
    requests = [parse_request(read_input(arguments.input), str(arguments.input))]
    if arguments.store:
        kind = {"target": target, "precision": precision, "device": arguments.device}
        answers = _answer_from_store(open_pipeline(artifact, root), requests, arguments, kind)
    else:
        with _open(artifact, root, arguments) as runtime:
            answers = open_pipeline(artifact, root).respond(runtime, requests)
    print(write_answer(answers[0]).decode())
    return 0


def _open(artifact: Artifact, root: Path, arguments: Any) -> Runtime:
    """A runtime of the artifact in this process, or of the same artifact on the server of --url."""
    if arguments.url:
        return open_runtime(root, engine=serving_engine(artifact), url=arguments.url)
    return open_runtime(root, device=arguments.device, threads=arguments.threads)


def _answer_from_store(pipeline: Pipeline, requests: list[Any], arguments: Any, kind: dict[str, str]) -> list[Any]:
    """The answers of the model's parts; outputs of the frozen parts are read from the store, and new ones added."""
    if pipeline.cascade is None:
        raise InputError(f"--store: expected a model with frozen parts, found {arguments.model}, which has none")
    with Store(arguments.store) as store, pipeline.cascade(arguments.repository, store, **kind) as cascade:
        return list(cascade.answer(requests))


def _parser() -> Any:
    result = parser(
        "runtimes.predict",
        __doc__.partition(":")[0] + ".",
        "policy_gru --example > request.json",
        "policy_gru --input request.json",
    )
    models_argument(result, "published model", least=1, most=1)
    result.add_argument(
        "--target",
        type=str.lower,
        help=f"target of the artifact (default: {TARGET}; with --url: the ensemble of the model)",
    )
    result.add_argument("--precision", type=str.lower, help=f"precision of the artifact (default: {PRECISION})")
    input_arguments(result)
    result.add_argument("--schema", action="store_true", help="print the JSON Schema of a request instead")
    repository_argument(result)
    device_arguments(result)
    result.add_argument(
        "--store", type=Path, metavar="DIR", help="answer by the model's parts, and keep outputs of frozen parts here"
    )
    result.add_argument("--url", help="request it of the Triton server at this gRPC HOST:PORT instead of this process")
    return result


if __name__ == "__main__":
    sys.exit(main())

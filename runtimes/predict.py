"""Answer a request with a published artifact, in this process or by a server: python -m runtimes.predict MODEL"""

import json
import sys
from pathlib import Path
from typing import Any

from runtimes.artifact import Artifact, artifact_name, require_plain
from runtimes.cache.store import Store
from runtimes.errors import InputError, one_line
from runtimes.host.cli import command, parser
from runtimes.pipeline import Pipeline, open_pipeline, parse_request, write_answer
from runtimes.repository import find
from runtimes.runtime import open_runtime, serving_engine
from runtimes.triton.client import ask

TARGET, PRECISION = "onnx", "fp32"


@command
def main(argv: list[str] | None = None) -> int:
    """Print the answer as JSON, or with --example a request to start from, or with --schema what a request must be.

    An answer has the same bytes wherever it was computed.
    """
    arguments = _parser().parse_args(argv)
    if arguments.url and arguments.store:
        raise InputError("--store: expected it without --url, found both; a server answers without a store")
    if arguments.url and not (arguments.target or arguments.example or arguments.schema):
        require_plain(arguments.model)
        print(ask(arguments.url, arguments.model, _request(arguments)).decode())
        return 0
    target, precision = arguments.target or TARGET, arguments.precision or PRECISION
    root = find(arguments.repository, artifact_name(arguments.model, target, precision))
    artifact = Artifact.load(root)
    if arguments.example or arguments.schema:
        pipeline = open_pipeline(artifact, root)
        print(json.dumps(pipeline.example() if arguments.example else pipeline.schema(), indent=1))
        return 0
    requests = [parse_request(_request(arguments), str(arguments.input))]
    if arguments.store:
        kind = {"target": target, "precision": precision, "device": arguments.device}
        answers = _answer_from_store(open_pipeline(artifact, root), requests, arguments, kind)
    else:
        served = {"engine": serving_engine(artifact), "url": arguments.url}
        with open_runtime(root, **(served if arguments.url else {"device": arguments.device})) as runtime:
            answers = open_pipeline(artifact, root).respond(runtime, requests)
    print(write_answer(answers[0]).decode())
    return 0


def _answer_from_store(pipeline: Pipeline, requests: list[Any], arguments: Any, kind: dict[str, str]) -> list[Any]:
    """The answers of the model's parts, with what the frozen ones said taken from the store and added to it."""
    if pipeline.cascade is None:
        raise InputError(f"--store: expected a model with frozen parts, found {arguments.model}, which has none")
    with Store(arguments.store) as store, pipeline.cascade(arguments.repository, store, **kind) as cascade:
        return list(cascade.answer(requests))


def _request(arguments: Any) -> bytes:
    """The bytes of the request, as they were given."""
    if not arguments.input:
        raise InputError("expected --input FILE with a request, found none; --example prints one to start from")
    if str(arguments.input) == "-":
        return sys.stdin.buffer.read()
    try:
        return arguments.input.read_bytes()
    except OSError as error:
        raise InputError(f"{arguments.input}: expected a readable file, found {one_line(error)}") from error


def _parser() -> Any:
    result = parser(
        "runtimes.predict",
        __doc__.partition(":")[0] + ".",
        "policy_gru --example > request.json",
        "policy_gru --input request.json",
    )
    result.add_argument("model", help="model name")
    result.add_argument("--target", help=f"target of the artifact (default: {TARGET}; with --url: the whole model's)")
    result.add_argument("--precision", help=f"precision of the artifact (default: {PRECISION})")
    result.add_argument("--input", type=Path, help="file with the request as JSON; - for standard input")
    result.add_argument("--example", action="store_true", help="print a valid request instead")
    result.add_argument("--schema", action="store_true", help="print the JSON Schema of a request instead")
    result.add_argument("--repository", type=Path, default=Path("model_repository"), help="where artifacts are")
    result.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    result.add_argument("--store", type=Path, help="answer by the model's parts, keeping what the frozen ones say here")
    result.add_argument("--url", help="ask the Triton server at this gRPC HOST:PORT instead of this process")
    return result


if __name__ == "__main__":
    sys.exit(main())

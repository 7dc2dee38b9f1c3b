"""Answer a request with a published artifact, in this process or by a server: python -m runtimes.predict MODEL"""

import json
import sys
from pathlib import Path
from typing import Any

from runtimes.artifact import artifact_name, read_json
from runtimes.base import open_runtime
from runtimes.caching import Store
from runtimes.command import command, parser
from runtimes.errors import InputError, one_line
from runtimes.pipeline import Pipeline, open_pipeline
from runtimes.repository import find


@command
def main(argv: list[str] | None = None) -> int:
    """Print the answer as JSON, or with --example a request to start from."""
    arguments = _parser().parse_args(argv)
    root = find(arguments.repository, artifact_name(arguments.model, arguments.target, arguments.precision))
    options = {"engine": "triton", "url": arguments.url} if arguments.url else {"device": arguments.device}
    with open_runtime(root, **options) as runtime:
        pipeline = open_pipeline(runtime.artifact, root)
        if arguments.example:
            print(json.dumps(pipeline.example(), indent=1))
            return 0
        if not arguments.input:
            raise InputError("expected --input FILE with a request, found none; --example prints one to start from")
        requests = [_request(arguments.input)]
        if arguments.store:
            answers = _answer_from_store(pipeline, requests, arguments)
        else:
            answers = pipeline.decode(runtime.fresh(pipeline.encode(requests)))
        print(json.dumps(answers[0], ensure_ascii=False))
    return 0


def _answer_from_store(pipeline: Pipeline, requests: list[Any], arguments: Any) -> list[Any]:
    """The answers of the model's parts, with what the frozen ones said taken from the store and added to it."""
    if pipeline.cascade is None:
        raise InputError(f"--store: expected a model with frozen parts, found {arguments.model}, which has none")
    kind = {"target": arguments.target, "precision": arguments.precision}
    with Store(arguments.store) as store, pipeline.cascade(arguments.repository, store, **kind) as cascade:
        return list(cascade.answer(requests))


def _request(path: Path) -> Any:
    if str(path) != "-":
        return read_json(path)
    try:
        return json.load(sys.stdin)
    except ValueError as error:  # not JSON, or not UTF-8
        raise InputError(f"standard input: expected JSON in UTF-8, found {one_line(error)}") from error


def _parser() -> Any:
    result = parser(
        "runtimes.predict",
        __doc__.partition(":")[0] + ".",
        "policy_gru --example > request.json",
        "policy_gru --input request.json",
    )
    result.add_argument("model", help="model name")
    result.add_argument("--target", default="onnx", help="target of the artifact (default: onnx)")
    result.add_argument("--precision", default="fp32", help="precision of the artifact (default: fp32)")
    result.add_argument("--input", type=Path, help="file with the request as JSON; - for standard input")
    result.add_argument("--example", action="store_true", help="print a valid request instead")
    result.add_argument("--repository", type=Path, default=Path("model_repository"), help="where artifacts are")
    result.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    result.add_argument("--store", type=Path, help="answer by the model's parts, keeping what the frozen ones say here")
    result.add_argument("--url", help="ask the Triton server at this gRPC HOST:PORT instead of this process")
    return result


if __name__ == "__main__":
    sys.exit(main())

"""Go on with a text, printed as it is written: python -m runtimes.write hnet --text ..."""

import json
import sys
from collections.abc import Generator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.artifact import artifact_name, require_plain
from runtimes.errors import EngineError, InputError, one_line
from runtimes.host.cli import command, parser
from runtimes.pipeline import parse_request
from runtimes.pipelines.hnet.generation import (
    DEFAULTS,
    EXAMPLE,
    GenerationRequest,
    can_write,
    read_generation_request,
    write,
)
from runtimes.repository import STEP_SUFFIX, find, writer_name
from runtimes.runtime import open_runtime
from runtimes.triton.client import CLIENTS

SETTINGS = {
    "max_bytes": (int, "bytes to write at most"),
    "temperature": (float, "0 is always the likeliest byte"),
    "top_k": (int, "among how many bytes to draw; 0 is all"),
    "seed": (int, "of the random numbers"),
}


@command
def main(argv: list[str] | None = None) -> int:
    """Print what the model writes, each character when it is complete; or with --json each piece as it was told."""
    arguments = _parser().parse_args(argv)
    if arguments.example:
        print(json.dumps(EXAMPLE, ensure_ascii=False))
        return 0
    request = _request(arguments)
    wish = read_generation_request(request, "request")
    pieces = _ask(arguments.url, arguments.model, request) if arguments.url else _write(arguments, wish)
    with closing(pieces):
        for each in pieces:
            print(json.dumps(each, ensure_ascii=False) if arguments.json else each["text"],
                  end="\n" if arguments.json else "", flush=True)  # fmt: skip
    if not arguments.json:
        print()
    return 0


def _write(arguments: Any, wish: GenerationRequest) -> Generator[Mapping[str, str]]:
    """The pieces that an artifact in this process writes."""
    target, precision = arguments.target, arguments.precision
    root = find(arguments.repository, artifact_name(f"{arguments.model}{STEP_SUFFIX}", target, precision))
    with open_runtime(root, device=arguments.device) as runtime:
        if not can_write(runtime.signature):
            raise InputError(f"expected a byte language model, found {arguments.model}")
        yield from write(runtime, wish)


def _ask(url: str, model: str, request: Any) -> Generator[Mapping[str, str]]:
    """The pieces that a server writes; whoever closes this has the server stop."""
    require_plain(model)
    client = CLIENTS["grpc"](url, 60.0)
    with closing(client):
        stream = client.stream(writer_name(model), {"request": np.array([json.dumps(request).encode()], np.object_)})
        for response in stream:
            try:
                piece: Mapping[str, str] = json.loads(response["answer"].item())
            except (KeyError, ValueError) as error:
                raise EngineError(f"{url}: expected pieces of text, found {one_line(error)}") from error
            yield piece


def _request(arguments: Any) -> Any:
    """The request of --input, or the one that the options describe."""
    if arguments.input:
        return parse_request(arguments.input.read_bytes(), str(arguments.input))
    if arguments.text is None:
        raise InputError("expected --text TEXT or --input FILE, found neither; --example prints a request")
    given = {name: getattr(arguments, name) for name in SETTINGS}
    return {"text": arguments.text, **{name: value for name, value in given.items() if value is not None}}


def _parser() -> Any:
    result = parser(
        "runtimes.write",
        __doc__.partition(":")[0] + ".",
        "hnet --text 'తెలుగు' --max-bytes 200 --temperature 0.8",
        "hnet --text 'తెలుగు' --url 127.0.0.1:8001 --json",
    )
    result.add_argument("model", help="name of a byte language model")
    result.add_argument("--text", help="what the text begins with")
    result.add_argument("--input", type=Path, help="file with a request in JSON instead")
    result.add_argument("--example", action="store_true", help="print a request to start from")
    for name, (kind, meaning) in SETTINGS.items():
        flag = f"--{name.replace('_', '-')}"
        result.add_argument(flag, type=kind, help=f"{meaning} (default: {DEFAULTS[name]})")
    result.add_argument("--json", action="store_true", help="print each piece as JSON on a line of its own")
    result.add_argument("--url", help="host:port of a server's gRPC; without it, this process writes")
    result.add_argument("--target", default="onnx", help="target of the artifact (default: onnx)")
    result.add_argument("--precision", default="fp32", help="precision of the artifact (default: fp32)")
    result.add_argument("--repository", type=Path, default=Path("model_repository"), help="where artifacts are")
    result.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    return result


if __name__ == "__main__":
    sys.exit(main())

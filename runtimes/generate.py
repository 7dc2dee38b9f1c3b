"""Answer a prompt token by token, with AARF where one is likely made up: python -m runtimes.generate MODEL"""

import json
import sys
from pathlib import Path
from typing import Any

from runtimes.artifact import artifact_name, read_json
from runtimes.engines.torch import Torch
from runtimes.errors import InputError
from runtimes.host.cli import command, parser
from runtimes.pipeline import open_pipeline
from runtimes.pipelines.hallucination.aarf import MitigatedPipeline
from runtimes.pipelines.hallucination.decoding import Mitigation
from runtimes.repository import find
from runtimes.runtime import open_runtime

DEFAULTS = Mitigation()
HEADS, LAYERS = "heads such as '25.0 18.13'", "layers such as '23 24'"


@command
def main(argv: list[str] | None = None) -> int:
    """Print the answer as JSON: its text, and of each token the score and whether its step was taken again."""
    arguments = _parser().parse_args(argv)
    root = find(arguments.repository, artifact_name(arguments.model, "torch", arguments.precision))
    with open_runtime(root, device=arguments.device, threads=arguments.threads) as runtime:
        pipeline = open_pipeline(runtime.artifact, root)
        if not isinstance(runtime, Torch) or not isinstance(pipeline, MitigatedPipeline):
            raise InputError(f"expected a model that generates with AARF, found {arguments.model}")
        if arguments.example:
            print(json.dumps(pipeline.example(), indent=1))
            return 0
        if not arguments.input:
            raise InputError("expected --input FILE with a request, found none; --example prints one to start from")
        ids, prompt = pipeline.prompt(read_json(arguments.input), arguments.max_new_tokens)
        generated = runtime.generate(
            ids,
            prompt,
            max_new_tokens=arguments.max_new_tokens,
            mitigation=None if arguments.plain else _mitigation(arguments),
            ends=pipeline.ends(),
        )
        print(json.dumps(pipeline.answer(generated), ensure_ascii=False))
    return 0


def _mitigation(arguments: Any) -> Mitigation:
    numbers = {name: getattr(arguments, name) for name in ("tau", "attend", "know", "alpha", "beta")}
    heads = None if arguments.heads is None else [_head(text) for text in arguments.heads.split()]
    layers = (
        None
        if arguments.layers is None
        else [_number(text, "layers such as '23 24'") for text in arguments.layers.split()]
    )
    return Mitigation(**numbers, heads=heads, layers=layers)


def _head(text: str) -> tuple[int, int]:
    layer, _, head = text.partition(".")
    return _number(layer, HEADS), _number(head, HEADS)


def _number(text: str, wanted: str) -> int:
    if not text.isdecimal():
        raise InputError(f"expected {wanted}, found '{text}'")
    return int(text)


def _parser() -> Any:
    result = parser(
        "runtimes.generate",
        __doc__.partition(":")[0] + ".",
        "hallucination_aarf --example > request.json",
        "hallucination_aarf --input request.json --max-new-tokens 64 --tau 0.4",
    )
    result.add_argument("model", help="model name")
    result.add_argument("--input", type=Path, help="file with the request as JSON")
    result.add_argument("--example", action="store_true", help="print a valid request instead")
    result.add_argument("--max-new-tokens", type=int, default=64, help="tokens of the answer at most (default: 64)")
    result.add_argument("--plain", action="store_true", help="score the tokens and reweight nothing")
    for name, meaning in (
        ("tau", "score above which a step is taken again"),
        ("attend", "factor of the heads"),
        ("know", "factor of the feed-forward parts"),
        ("alpha", "weight of PKS in the score"),
        ("beta", "weight of ECS in the score"),
    ):
        default = getattr(DEFAULTS, name)
        result.add_argument(f"--{name}", type=float, default=default, help=f"{meaning} (default: {default})")
    result.add_argument("--heads", help="heads to score and reweight, such as '25.0 18.13' (default: all it scores)")
    result.add_argument("--layers", help="layers to score and reweight, such as '23 24' (default: all it scores)")
    result.add_argument("--precision", default="fp32", help="precision of the artifact (default: fp32)")
    result.add_argument("--repository", type=Path, default=Path("model_repository"), help="where artifacts are")
    result.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    result.add_argument("--threads", type=int, default=1, help="threads of a step (default: 1)")
    return result


if __name__ == "__main__":
    sys.exit(main())

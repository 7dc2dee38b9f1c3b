"""Measure vLLM, plain and quantized, beside transformers' generate: python -m runtimes.bench.vllm --plain FOLDER

All engines are open at once and take turns, round by round, on the same prompts: what a noisy machine does to one, it
does to the others. Tokens are greedy, and as many after every prompt.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from runtimes.artifact import write_json
from runtimes.errors import EngineError, InputError, require
from runtimes.host.cli import command, existing_folder, parser, table
from runtimes.host.memory_sampler import tree
from runtimes.search.papers import read_papers
from runtimes.vllm.artifact import CHECKPOINT
from runtimes.vllm.process import VllmModel

SCHEMA = "slipway.vllm_bench/1"
CHECKOUT = Path(__file__).parents[2]
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
SCORED_AT_ONCE = 16
WARM_TOKENS = 4
PLAIN = "vLLM plain"
ROOM = 8  # tokens of a window beyond those that are asked for


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What every engine is given: prompts of one length as token ids, and the tokens wanted after each."""

    prompts: list[list[int]]
    tokens: int

    @property
    def total(self) -> int:
        return len(self.prompts) * self.tokens


@dataclass(kw_only=True, slots=True)
class Turn:
    """One round of one engine: wall and CPU time for all tokens, and the time to the first of a lone prompt."""

    seconds: float
    cpu_s: float
    first_s: float


@dataclass(kw_only=True, slots=True)
class Row:
    """What one engine did under one load of `prompts` prompts and `total` tokens."""

    name: str
    provider: str
    prompts: int
    total: int
    memory_bytes: int = 0
    turns: list[Turn] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        return self.total / float(np.median([turn.seconds for turn in self.turns]))

    @property
    def cpu_ms_per_token(self) -> float:
        return 1000 * float(np.median([turn.cpu_s for turn in self.turns])) / self.total

    @property
    def first_s(self) -> float:
        return float(np.median([turn.first_s for turn in self.turns]))


class Subject(ABC):
    """An engine that is open: `generate` answers a load, `first_s` is the time to the first token of one prompt."""

    def __init__(self, name: str, provider: str, pid: int) -> None:
        self.name = name
        self.provider = provider
        self.pid = pid

    @abstractmethod
    def generate(self, load: Load) -> float:
        """The seconds that all tokens took."""

    @abstractmethod
    def first_s(self, prompt: list[int]) -> float:
        """The seconds to the first token after a lone prompt."""

    def turn(self, load: Load) -> Turn:
        """One round; CPU time is that of the engine's whole family of processes."""
        before = cpu_s(self.pid)
        seconds = self.generate(load)
        spent = cpu_s(self.pid) - before
        return Turn(seconds=seconds, cpu_s=spent, first_s=self.first_s(load.prompts[0]))


class VllmSubject(Subject):
    """A checkpoint in vLLM; all prompts arrive at once and vLLM makes the batches."""

    def __init__(self, name: str, model: VllmModel) -> None:
        super().__init__(name, str(model.open()), model.pid)
        self.model = model

    def generate(self, load: Load) -> float:
        started = time.perf_counter()
        completions = self.model.complete(load.prompts, **greedy(load.tokens))
        seconds = time.perf_counter() - started
        written = sum(len(completion.token_ids) for completion in completions)
        if written != load.total:
            raise EngineError(f"{self.name}: expected {load.total} tokens, found {written}")
        return seconds

    def first_s(self, prompt: list[int]) -> float:
        started = time.perf_counter()
        stream = self.model.stream(prompt, **greedy(2))
        next(stream)
        seconds = time.perf_counter() - started
        for _ in stream:  # the engine is idle again when the next one's turn comes
            pass
        return seconds

    def scores(self, texts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Logprob of every token but the first of each text, and the likeliest token in its place."""
        blocks = [texts[i : i + SCORED_AT_ONCE] for i in range(0, len(texts), SCORED_AT_ONCE)]
        scored = [each for block in blocks for each in self.model.score(block)]
        return np.concatenate([row[1:] for row, _ in scored]), np.concatenate([ids[:-1] for _, ids in scored])


class TransformersSubject(Subject):
    """A checkpoint in transformers, in a process of its own, prompt by prompt or as one batch."""

    def __init__(self, name: str, folder: Path, *, dtype: str, device: str, threads: int, batched: bool) -> None:
        arguments = [str(folder), dtype, device, str(threads)]
        self.folder = tempfile.TemporaryDirectory(prefix="slipway-")
        self.log = Path(self.folder.name, "log")  # a pipe that nobody reads would fill, and stop it
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "runtimes.bench.transformers_worker", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=CHECKOUT,
                env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
                start_new_session=True,  # as vLLM has one: the scheduler shares a busy machine out among sessions
            )
        self.batched = batched
        super().__init__(name, f"transformers {self._answer()['version']} {device} {dtype}", self.process.pid)

    def generate(self, load: Load) -> float:
        return float(self._ask(load.prompts, load.tokens, first=False)["seconds"])

    def first_s(self, prompt: list[int]) -> float:
        return float(self._ask([prompt], 1, first=True)["first_s"])

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.folder.cleanup()

    def _ask(self, prompts: list[list[int]], tokens: int, *, first: bool) -> Any:
        assert self.process.stdin
        asked = {"prompts": prompts, "tokens": tokens, "batched": self.batched, "first": first}
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout
        if line := self.process.stdout.readline():
            return json.loads(line)
        last = (self.log.read_text().strip().splitlines() or ["nothing"])[-1]
        raise EngineError(f"expected an answer of transformers, it died and says: {last}")


@command
def main(argv: list[str] | None = None) -> int:
    """Measure, print one table, and with --out keep every turn."""
    arguments = _parser().parse_args(argv)
    checkpoints = {"plain": checkpoint(arguments.plain)}
    if arguments.quantized:
        checkpoints["quantized"] = checkpoint(arguments.quantized)
    loads, texts = read_loads(checkpoints["plain"], arguments)
    before = os.getloadavg()[0]
    with ExitStack() as stack:
        subjects = list(open_subjects(stack, checkpoints, arguments))
        rows = [row for load in loads for row in take_turns(subjects, load, arguments.rounds)]
        quality = list(judge([subject for subject in subjects if isinstance(subject, VllmSubject)], texts))
    print(row_table(rows))
    print(f"\nprompts of {arguments.prompt_tokens} tokens, {arguments.tokens} after each, {arguments.rounds} rounds")
    print(f"load of the machine {before:.1f} before, {os.getloadavg()[0]:.1f} after; {arguments.threads} thread(s)")
    for each in quality:
        print(
            "{name}: perplexity {perplexity:.2f} of {tokens} held-out tokens, likeliest alike {alike:.3f}".format(
                **each
            )
        )
    if len(checkpoints) == 2:
        share = quantized_share(checkpoints["plain"], checkpoints["quantized"])
        print(f"bytes of the quantized layers over those in bfloat16: {share:.3f}")
    if arguments.out:
        write_json(arguments.out, {"schema": SCHEMA, "quality": quality, "rows": [asdict(row) for row in rows]})
    return 0


def open_subjects(stack: ExitStack, checkpoints: dict[str, Path], arguments: Any) -> Iterator[Subject]:
    """Every engine, open until the stack is left."""
    engine = {"device": arguments.device, "threads": arguments.threads}
    for dtype in arguments.transformers_dtype:
        for batched in (False, True):
            name = f"transformers {dtype}, {'one batch' if batched else 'one by one'}"
            subject = TransformersSubject(name, checkpoints["plain"], dtype=dtype, batched=batched, **engine)
            stack.callback(subject.close)
            yield subject
    for name, folder in checkpoints.items():
        window = arguments.window + arguments.tokens + ROOM
        model = VllmModel({"model": str(folder), "dtype": "bfloat16", "max_model_len": window}, **engine)
        stack.callback(model.close)
        yield VllmSubject(f"vLLM {name}", model)


def take_turns(subjects: Sequence[Subject], load: Load, rounds: int) -> list[Row]:
    """What every engine did in `rounds` turns, after a short one that does not count."""
    warm = replace(load, tokens=min(WARM_TOKENS, load.tokens))
    for subject in subjects:
        subject.turn(warm)
    rows = [
        Row(name=each.name, provider=each.provider, prompts=len(load.prompts), total=load.total) for each in subjects
    ]
    for _ in tqdm(range(rounds), disable=not sys.stderr.isatty(), leave=False):
        for subject, row in zip(subjects, rows, strict=True):
            row.turns.append(subject.turn(load))
            row.memory_bytes = max(row.memory_bytes, memory_bytes(subject.pid))
    return rows


def judge(subjects: Sequence[VllmSubject], texts: Sequence[Sequence[int]]) -> Iterator[dict[str, Any]]:
    """Perplexity of every checkpoint, and the share of likeliest tokens in which it agrees with the first."""
    found = [subject.scores(texts) for subject in subjects]
    for subject, (logprobs, likeliest) in zip(subjects, found, strict=True):
        yield {
            "name": subject.name,
            "tokens": len(logprobs),
            "perplexity": float(np.exp(-logprobs.astype(float).mean())),
            "alike": float((likeliest == found[0][1]).mean()),
        }


def read_loads(folder: Path, arguments: Any) -> tuple[list[Load], list[list[int]]]:
    """Prompts of one length and texts to score, all from the file of held-out texts; `InputError` if it has too few."""
    tokenizers = require("tokenizers", extra="train")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [statement.text for paper in read_papers(arguments.data) for statement in paper.statements]
    rows = [encoding.ids[: arguments.window] for encoding in tokenizer.encode_batch(texts)]
    long = [row[: arguments.prompt_tokens] for row in rows if len(row) >= arguments.prompt_tokens]
    if len(long) < max(arguments.prompts):
        raise InputError(
            f"{arguments.data}: expected {max(arguments.prompts)} texts of {arguments.prompt_tokens} tokens or more, "
            f"found {len(long)}"
        )
    scored = [row for row in rows if len(row) > 1][: arguments.texts]
    return [Load(prompts=long[:count], tokens=arguments.tokens) for count in arguments.prompts], scored


def checkpoint(folder: Path) -> Path:
    """The Hugging Face folder in the version folder of an artifact, or the folder itself."""
    existing_folder(folder, "a checkpoint")
    inner = folder / CHECKPOINT
    return (inner if inner.is_dir() else folder).absolute()


def quantized_share(plain: Path, quantized: Path) -> float:
    """Bytes of every layer that was quantized, with scales and zero points, over its bytes in bfloat16."""
    wide, small = headers(plain), headers(quantized)
    layers = {name.removesuffix(".weight_packed") for name in small if name.endswith(".weight_packed")}
    if not layers:
        raise InputError(f"{quantized}: expected packed weights, found none")
    packed = sum(end - start for name, (_, (start, end)) in small.items() if name.rpartition(".")[0] in layers)
    return packed / sum(2 * int(np.prod(wide[f"{layer}.weight"][0])) for layer in layers)


def headers(folder: Path) -> dict[str, tuple[list[int], list[int]]]:
    """Shape and place of every tensor in the safetensors files of a folder."""
    found: dict[str, tuple[list[int], list[int]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        found |= {name: (each["shape"], each["data_offsets"]) for name, each in header.items() if "shape" in each}
    return found


def greedy(tokens: int) -> dict[str, Any]:
    return {"max_tokens": tokens, "min_tokens": tokens, "temperature": 0, "ignore_eos": True}


def cpu_s(pid: int) -> float:
    """CPU time that a process and its living descendants have used."""
    return sum(_ticks(each) for each in tree(pid)) / TICKS_PER_S


def _ticks(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has just ended
        return 0
    return int(fields[11]) + int(fields[12])


def memory_bytes(pid: int) -> int:
    """What a process and its descendants hold in memory, with what they share counted once (PSS)."""
    return sum(_proportional(each) for each in tree(pid))


def _proportional(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def row_table(rows: Sequence[Row]) -> str:
    """The rows as text; ratios are to the first engine, and to plain vLLM, under the same load."""
    lines = []
    for row in rows:
        alike = [other for other in rows if other.prompts == row.prompts]
        plain = next((other for other in alike if other.name == PLAIN), alike[0])
        seconds = [turn.seconds for turn in row.turns]
        lines.append(
            (
                row.prompts,
                row.name,
                f"{row.tokens_per_s:.1f}",
                f"{row.total / max(seconds):.1f} to {row.total / min(seconds):.1f}",
                f"{row.tokens_per_s / alike[0].tokens_per_s:.2f}",
                f"{row.tokens_per_s / plain.tokens_per_s:.2f}",
                f"{row.cpu_ms_per_token:.1f}",
                f"{1000 * row.first_s:.0f}",
                f"{row.memory_bytes / 2**30:.2f}",
                row.provider,
            )
        )
    header = ["prompts", "engine", "tokens/s", "range", "x first", "x vLLM plain", "CPU ms/token", "first ms", "GiB"]
    return table([*header, "what runs"], lines)


def _parser() -> Any:
    result = parser(
        "runtimes.bench.vllm",
        __doc__.partition(":")[0] + ".",
        "--plain decoders/90m --quantized decoders/90m_w4 --data stacks_valid.jsonl",
        "--plain decoders/90m --quantized decoders/90m_w4 --data stacks_valid.jsonl --rounds 9 --out results.json",
    )
    result.add_argument("--plain", type=Path, required=True, help="folder of the decoder in bfloat16, or its artifact")
    result.add_argument("--quantized", type=Path, help="folder of the quantized decoder, or its artifact")
    result.add_argument("--data", type=Path, required=True, help="held-out statements: prompts, and texts to score")
    result.add_argument("--prompts", type=int, nargs="+", default=[1, 16], help="at once; several for several tables")
    result.add_argument("--prompt-tokens", type=int, default=32)
    result.add_argument("--tokens", type=int, default=32, help="after each prompt")
    result.add_argument("--texts", type=int, default=128, help="texts to score")
    result.add_argument("--window", type=int, default=128, help="tokens of a text that are read")
    result.add_argument("--rounds", type=int, default=5)
    result.add_argument("--threads", type=int, default=1, help="of each engine")
    result.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    result.add_argument(
        "--transformers-dtype", nargs="*", default=["bfloat16", "float32"], help="what transformers computes in"
    )
    result.add_argument("--out", type=Path, help="keep every turn in this file")
    return result


if __name__ == "__main__":
    sys.exit(main())

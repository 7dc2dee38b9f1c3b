"""The engines of the benchmark of vLLM: a checkpoint in vLLM, and one in transformers in a child process."""

import json
import os
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.bench.measure import CHECKOUT
from runtimes.errors import EngineError
from runtimes.host.memory_sampler import tree
from runtimes.vllm.process import VllmModel

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
SCORED_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """The input of every engine: prompts of one length as token ids, and the number of tokens after each."""

    prompts: list[list[int]]
    tokens: int

    @property
    def total(self) -> int:
        return len(self.prompts) * self.tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One round of one engine: wall and CPU time of all tokens, and the time to the first token of a lone prompt."""

    seconds: float
    cpu_s: float
    first_s: float


@dataclass(kw_only=True, slots=True)
class Row:
    """The rounds of one engine under one load of `prompts` prompts and `total` tokens."""

    name: str
    provider: str
    prompts: int
    total: int
    memory_bytes: int = 0
    turns: list[Round] = field(default_factory=list)  # the key of results files

    @property
    def tokens_per_s(self) -> float:
        return self.total / float(np.median([each.seconds for each in self.turns]))

    @property
    def cpu_ms_per_token(self) -> float:
        return 1000 * float(np.median([each.cpu_s for each in self.turns])) / self.total

    @property
    def first_s(self) -> float:
        return float(np.median([each.first_s for each in self.turns]))


class LanguageEngine(ABC):
    """An open engine: `generate` processes a load, `first_s` measures the time to the first token of one prompt."""

    def __init__(self, name: str, provider: str, pid: int) -> None:
        self.name = name
        self.provider = provider
        self.pid = pid

    @abstractmethod
    def generate(self, load: Load) -> float:
        """The seconds of all tokens of the load."""

    @abstractmethod
    def first_s(self, prompt: list[int]) -> float:
        """The seconds to the first token after a lone prompt."""

    def round(self, load: Load) -> Round:
        """One round; its CPU time is that of the engine's process and all its descendants."""
        before = cpu_s(self.pid)
        seconds = self.generate(load)
        spent = cpu_s(self.pid) - before
        return Round(seconds=seconds, cpu_s=spent, first_s=self.first_s(load.prompts[0]))


class VllmEngine(LanguageEngine):
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
            raise EngineError(f"{self.name}: expected {load.total} tokens, found {written}; use a longer --window")
        return seconds

    def first_s(self, prompt: list[int]) -> float:
        started = time.perf_counter()
        stream = self.model.stream(prompt, **greedy(2))
        next(stream)
        seconds = time.perf_counter() - started
        for _ in stream:  # the engine is idle again before the next one is measured
            pass
        return seconds

    def scores(self, texts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Logprob of every token but the first of each text, and the likeliest token in its place."""
        blocks = [texts[i : i + SCORED_AT_ONCE] for i in range(0, len(texts), SCORED_AT_ONCE)]
        scored = [each for block in blocks for each in self.model.score(block)]
        return np.concatenate([row[1:] for row, _ in scored]), np.concatenate([ids[:-1] for _, ids in scored])


class TransformersEngine(LanguageEngine):
    """A checkpoint in transformers, in a child process, prompt by prompt or as one batch."""

    def __init__(self, name: str, folder: Path, *, dtype: str, device: str, threads: int, batched: bool) -> None:
        arguments = [str(folder), dtype, device, str(threads)]
        self.folder = tempfile.TemporaryDirectory(prefix="slipway-")
        self.log = Path(self.folder.name, "log")  # an unread pipe would fill and block the process
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "runtimes.bench.transformers_worker", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=CHECKOUT,
                env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
                start_new_session=True,  # like vLLM: the scheduler divides a busy machine among sessions
            )
        self.batched = batched
        super().__init__(name, f"transformers {self._answer()['version']} {device} {dtype}", self.process.pid)

    def generate(self, load: Load) -> float:
        return float(self._request(load.prompts, load.tokens, first=False)["seconds"])

    def first_s(self, prompt: list[int]) -> float:
        return float(self._request([prompt], 1, first=True)["first_s"])

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.folder.cleanup()

    def _request(self, prompts: list[list[int]], tokens: int, *, first: bool) -> Any:
        assert self.process.stdin
        request = {"prompts": prompts, "tokens": tokens, "batched": self.batched, "first": first}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout
        if line := self.process.stdout.readline():
            return json.loads(line)
        last = (self.log.read_text().strip().splitlines() or ["no output"])[-1]
        raise EngineError(f"expected an answer of transformers, found its process ended: {last}")


def greedy(tokens: int) -> dict[str, Any]:
    """The options of vLLM for exactly so many tokens, each the likeliest."""
    return {"max_tokens": tokens, "min_tokens": tokens, "temperature": 0, "ignore_eos": True}


def cpu_s(pid: int) -> float:
    """CPU time of a process and its living descendants."""
    return sum(_ticks(each) for each in tree(pid)) / TICKS_PER_S


def _ticks(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has just ended
        return 0
    return int(fields[11]) + int(fields[12])


def memory_bytes(pid: int) -> int:
    """Memory of a process and its descendants, with shared pages counted once (PSS)."""
    return sum(_proportional(each) for each in tree(pid))


def _proportional(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)

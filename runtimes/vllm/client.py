"""Requests to vLLM's OpenAI-compatible server: completions, streamed completions, scores, vectors, metrics."""

import base64
import http.client
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtimes.errors import EngineError, InputError, one_line
from runtimes.vllm.server import SERVED_NAME

Prompt = str | Sequence[int]  # a text, or its token ids
LAST_LINE = "[DONE]"
SAMPLE = re.compile(r"^(?P<name>[^#{ ]+)(?:\{.*\})? (?P<value>\S+)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """The completion of a prompt, or its next piece.

    `logprobs` in nats, one a token, if they were requested. `finish_reason` is None until the last piece.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    logprobs: tuple[float, ...] | None = None
    prompt_tokens: int | None = None


class VllmClient:
    """The server at `url` ("host:port").

    `InputError` with the server's message for a refused request, `EngineError` if it fails, is gone, or sends
    nothing for `timeout_s`.
    """

    def __init__(self, url: str, timeout_s: float = 600.0) -> None:
        self.url = url
        self.timeout_s = timeout_s

    def complete(self, prompts: Sequence[Prompt], **sampling: Any) -> list[Completion]:
        """One completion for each prompt; `sampling` has parameters such as max_tokens, temperature, stop."""
        answer = self._post("/v1/completions", _completion_request(_together(prompts), sampling))
        return [_completion(choice) for choice in answer["choices"]]

    def stream(self, prompt: Prompt, **sampling: Any) -> Iterator[Completion]:
        """The pieces of one completion as they are made. An iterator that is closed, or dropped, ends the request."""
        request = _completion_request(_together([prompt]), {**sampling, "stream": True})
        with self._sent("POST", "/v1/completions", request) as response:
            for line in response:
                printed = line.decode().removeprefix("data: ").strip()
                if printed == LAST_LINE:
                    return
                if printed:
                    yield _completion(_unless_error(json.loads(printed))["choices"][0])
        raise EngineError(f"vLLM at {self.url}: expected a stream that ends with {LAST_LINE}, found its end before")

    def score(self, prompts: Sequence[Sequence[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """For the token ids of each prompt: the logprob of each token given those before it, and the likeliest next.

        float32 and int64 [tokens]; the first logprob is 0.
        """
        sampling = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 1, "ignore_eos": True}
        answer = self._post("/v1/completions", _completion_request([list(prompt) for prompt in prompts], sampling))
        pairs = zip(prompts, answer["choices"], strict=True)
        return [_scores(prompt, choice) for prompt, choice in pairs]

    def embed(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """The vectors of the prompts, float32 [prompts, width]."""
        request = {"model": SERVED_NAME, "input": _together(prompts), "encoding_format": "base64"}
        answer = self._post("/v1/embeddings", request)
        rows = sorted(answer["data"], key=lambda row: row["index"])
        return np.stack([np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in rows])

    def metrics(self) -> dict[str, float]:
        """Every number at /metrics by its name; those that differ in their labels only are summed."""
        totals: dict[str, float] = {}
        with self._sent("GET", "/metrics") as response:
            for sample in SAMPLE.finditer(response.read().decode()):
                totals[sample["name"]] = totals.get(sample["name"], 0.0) + float(sample["value"])
        return totals

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        with self._sent("POST", path, body) as response:
            return json.load(response)

    @contextmanager
    def _sent(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """The response to a request that was not refused; it is closed in the end, which ends an unfinished request."""
        connection = http.client.HTTPConnection(self.url, timeout=self.timeout_s)
        try:
            connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise _refusal(path, response.status, response.read())
            yield response
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
            raise EngineError(f"vLLM at {self.url}: expected an answer, found {one_line(error)}") from error
        finally:
            connection.close()


def _completion_request(prompts: Any, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """A request for completions; logprobs, if requested, are those of the chosen tokens."""
    ours = {"model": SERVED_NAME, "prompt": prompts, "return_token_ids": True}
    return {**sampling, **ours}


def _together(prompts: Sequence[Prompt]) -> list[Any]:
    """The prompts as the API takes them; `InputError` for texts beside token ids."""
    texts = [isinstance(prompt, str) for prompt in prompts]
    if any(texts) and not all(texts):
        raise InputError("expected prompts that are all texts or all token ids, found both")
    return [prompt if isinstance(prompt, str) else list(map(int, prompt)) for prompt in prompts]


def _completion(choice: Mapping[str, Any]) -> Completion:
    logprobs = choice.get("logprobs")
    prompt = choice.get("prompt_token_ids")
    return Completion(
        text=choice["text"],
        token_ids=tuple(choice.get("token_ids") or ()),
        finish_reason=choice.get("finish_reason"),
        logprobs=tuple(logprobs["token_logprobs"]) if logprobs else None,
        prompt_tokens=None if prompt is None else len(prompt),
    )


def _scores(prompt: Sequence[int], choice: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    logprobs, likeliest = np.zeros(len(prompt), np.float32), np.zeros(len(prompt), np.int64)
    for place, (token, candidates) in enumerate(zip(prompt, choice["prompt_logprobs"], strict=True)):
        if place > 0:  # the first has no score: no token precedes it
            logprobs[place] = candidates[str(token)]["logprob"]
            likeliest[place - 1] = next(int(name) for name, each in candidates.items() if each["rank"] == 1)
    likeliest[-1] = choice["token_ids"][0]
    return logprobs, likeliest


def _unless_error(answer: Any) -> Any:
    if "error" in answer:
        raise EngineError(f"vLLM failed: {_message(answer)}")
    return answer


def _refusal(path: str, status: int, body: bytes) -> InputError | EngineError:
    if status == 404:  # it serves only the paths that its model supports
        return InputError(f"vLLM refuses the request: its model does not support {path}")
    try:
        printed = _message(json.loads(body))
    except (ValueError, KeyError, TypeError):
        printed = one_line(body.decode(errors="replace"))
    if 400 <= status < 500:
        return InputError(f"vLLM refuses the request: {printed}")
    return EngineError(f"vLLM failed with status {status}: {printed}")


def _message(answer: Any) -> str:
    return one_line(str(answer["error"]["message"]))

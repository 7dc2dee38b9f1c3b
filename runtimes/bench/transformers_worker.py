"""transformers' `generate` in a child process: python -m runtimes.bench.transformers_worker FOLDER

It writes one JSON line for each line on standard input: prompts as token ids, whether they form one batch, and the
number of tokens after each.
"""

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from runtimes.errors import require


class FirstToken:
    """A streamer for transformers that records the time of each token."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, _: Any) -> None:
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last token."""


def main(argv: Sequence[str]) -> None:
    """Serve FOLDER in DTYPE on DEVICE with THREADS threads until standard input ends."""
    folder, dtype, device, threads = argv
    torch = require("torch", extra="train")
    transformers = require("transformers", extra="train")
    torch.set_num_threads(int(threads))
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), local_files_only=True, use_safetensors=True
    )
    model = model.to(device).eval()
    print(json.dumps({"version": transformers.__version__}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        batches = [request["prompts"]] if request["batched"] else [[prompt] for prompt in request["prompts"]]
        started = time.perf_counter()
        rows = [row for batch in batches for row in generate(torch, model, batch, request["tokens"])]
        seconds = time.perf_counter() - started
        first_s = first_token_s(torch, model, request["prompts"][0]) if request["first"] else None
        print(json.dumps({"seconds": seconds, "first_s": first_s, "token_ids": rows}), flush=True)


def generate(torch: Any, model: Any, prompts: list[list[int]], tokens: int, **options: Any) -> list[list[int]]:
    """Exactly `tokens` tokens after each prompt, each the likeliest; the prompts have one length."""
    ids = torch.tensor(prompts, device=model.device)
    lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    with torch.inference_mode():
        completed = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **lengths, **options)
    rows: list[list[int]] = completed[:, ids.shape[1] :].tolist()
    return rows


def first_token_s(torch: Any, model: Any, prompt: list[int]) -> float:
    """Seconds from the call to the first new token; the streamer receives the prompt before it."""
    clock, started = FirstToken(), time.perf_counter()
    generate(torch, model, [prompt], 2, streamer=clock)
    return clock.times_s[1] - started


if __name__ == "__main__":
    main(sys.argv[1:])

"""Make the decoder of the benchmark of vLLM: python -m benchmarks.vllm.make_decoder --data stacks_train.jsonl

A Llama of about 90 million parameters, trained on statements until its perplexity is far below that of an untrained
model.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from runtimes.host.cli import command, parser
from runtimes.host.progress import progress
from runtimes.search.papers import read_papers
from training.models.statements.synthetic import flatten
from training.random_init import train_tokenizer

VOCABULARY, END = 8000, "<end>"


@command
def main(argv: list[str] | None = None) -> int:
    """Write a Hugging Face folder with a decoder and its tokenizer."""
    arguments = _parser().parse_args(argv)
    texts, _ = flatten(list(read_papers(arguments.data)))
    tokenizer = train_tokenizer(texts, VOCABULARY, (END,), single="$A")
    stream = np.concatenate([[*encoding.ids, 0] for encoding in tokenizer.encode_batch(texts)])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=arguments.width,
        intermediate_size=3 * arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.width // 64,
        num_key_value_heads=arguments.width // 64,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    loss = train(model, stream, arguments)
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END).save_pretrained(arguments.out)
    parameters = sum(tensor.numel() for tensor in model.parameters())
    print(f"{arguments.out}: {parameters / 1e6:.1f} million parameters, loss {loss:.3f} after {arguments.steps} steps")
    return 0


def train(model: LlamaForCausalLM, stream: np.ndarray, arguments: argparse.Namespace) -> float:
    """The mean loss of the last ten steps, in nats a token."""
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, max(2, arguments.steps), pct_start=0.1)
    losses = []
    for _ in progress(range(arguments.steps), "train the decoder"):
        starts = rng.integers(0, len(stream) - arguments.tokens, arguments.batch)
        ids = torch.tensor(np.stack([stream[start : start + arguments.tokens] for start in starts]))
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return float(np.mean(losses[-10:])) if losses else float("nan")


def _parser() -> Any:
    result = parser(
        "benchmarks.vllm.make_decoder",
        "Makes a decoder.",
        "--data stacks_train.jsonl --out decoders/90m",
        "--data stacks_train.jsonl --out decoders/7m --width 256 --layers 4",
    )
    result.add_argument("--data", type=Path, required=True, help="file with papers")
    result.add_argument("--out", type=Path, required=True, help="folder of the decoder")
    result.add_argument("--width", type=int, default=768, help="hidden size (default: %(default)s)")
    result.add_argument("--layers", type=int, default=10, help="layers (default: %(default)s)")
    result.add_argument("--steps", type=int, default=80, help="training steps (default: %(default)s)")
    result.add_argument("--batch", type=int, default=8, help="rows of a step (default: %(default)s)")
    result.add_argument("--tokens", type=int, default=64, help="tokens of a row (default: %(default)s)")
    return result


if __name__ == "__main__":
    sys.exit(main())

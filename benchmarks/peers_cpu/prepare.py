"""Make the texts and the embedder of the comparison with peers: python -m benchmarks.peers_cpu.prepare"""

import ast
import json
import random
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from benchmarks.peers_cpu.variants import ROOT
from runtimes.host.cli import command, parser

ANSWERED, HELD_BACK = 512, 1112


def prepare(base: Path, out: Path) -> None:
    """`out` has the texts, and the embedder as Slipway's checkpoint and as a sentence-transformers folder."""
    out.mkdir(parents=True, exist_ok=True)
    texts = sentences()
    parts = {"answer": texts[:ANSWERED], "calibrate": texts[ANSWERED:HELD_BACK]}
    (out / "texts.json").write_text(json.dumps(parts))
    papers = [
        {"arxiv_id": str(i), "title": "", "statements": [{"type": "text", "text": text} for text in pair]}
        for i, pair in enumerate(zip(parts["calibrate"][::2], parts["calibrate"][1::2], strict=True))
    ]
    (out / "papers.jsonl").write_text("".join(json.dumps(paper) + "\n" for paper in papers))
    settings = {"base": base, "pooling": "mean", "lora_targets": "query,key,value", "epochs": 0.1}
    options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "training.run", "statements", "--data", out / "papers.jsonl", *options]
    subprocess.run([*map(str, command), "--out", str(out / "checkpoints")], check=True, cwd=ROOT)
    save_sentence_transformers(out / "checkpoints" / "statements", base, out / "embedder")


def save_sentence_transformers(checkpoint: Path, base: Path, out: Path) -> None:
    """Write the checkpoint with merged adapters for sentence-transformers: encoder, mean, Dense, norm."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from export.source import Source
    from training.checkpoint import Checkpoint
    from training.spec import find_spec

    module = Source(find_spec("statements"), Checkpoint.load(checkpoint)).module
    module.base.save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    width_out, width_in = module.projection.weight.shape
    dense = {"in_features": width_in, "out_features": width_out, "bias": True}
    dense["activation_function"] = "torch.nn.modules.linear.Identity"
    kinds = ("Transformer", "Pooling", "Dense", "Normalize")
    folders = ("", "1_Pooling", "2_Dense", "3_Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(zip(folders, kinds, strict=True))
    ]
    for folder in folders[1:]:
        (out / folder).mkdir(exist_ok=True)
    pooling = {"word_embedding_dimension": width_in, "pooling_mode_mean_tokens": True}
    (out / "modules.json").write_text(json.dumps(modules))
    (out / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 256, "do_lower_case": False}))
    (out / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (out / "2_Dense" / "config.json").write_text(json.dumps(dense))
    state = {f"linear.{name}": value.contiguous() for name, value in module.projection.state_dict().items()}
    save_file(state, out / "2_Dense" / "model.safetensors")


def sentences() -> list[str]:
    """Sentences and paragraphs of the standard library's docstrings, in a fixed order."""
    found = set()
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted([*root.glob("*.py"), *root.glob("[!_]*/*.py")]):
        if any(part in path.parts for part in ("test", "tests", "idlelib", "site-packages", "dist-packages")):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                found |= {" ".join(each.split()) for each in (ast.get_docstring(node) or "").split("\n\n")}
    drawn, rng = set(), random.Random(0)
    for paragraph in sorted(found):
        pieces = [paragraph] if rng.random() < 0.12 else re.split(r"(?<=[.!?]) ", paragraph)
        drawn |= {piece for piece in pieces if 25 < len(piece) < 900 and ">>>" not in piece}
    texts = sorted(drawn)
    rng.shuffle(texts)
    return texts[:HELD_BACK]


@command
def main(argv: list[str] | None = None) -> int:
    """The folder of --out holds everything that benchmarks.peers_cpu.run needs but the artifacts."""
    arguments = _parser().parse_args(argv)
    prepare(arguments.base.resolve(), arguments.out.resolve())
    return 0


def _parser() -> Any:
    result = parser(
        "benchmarks.peers_cpu.prepare",
        __doc__.partition(": python")[0] + ".",
        "--base bases/minilm --out peers",
        "--base bases/base --out peers_base",
    )
    result.add_argument("--base", type=Path, required=True, help="folder of a BERT-like encoder, such as MiniLM")
    result.add_argument("--out", type=Path, required=True, help="folder to make")
    return result


if __name__ == "__main__":
    sys.exit(main())

"""Training learns, and a trained model embeds collections: aligned, resumed after a kill, equal for all processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from runtimes.errors import InputError
from runtimes.search.collection import Collection
from tests.toys import wait_for
from training import embed_dataset
from training.checkpoint import Checkpoint, restore
from training.embed_dataset import DatasetEmbedder, EmbeddingJob
from training.evaluate import main as evaluate
from training.models.statements.embedding import Embedder, open_embedder
from training.precompute import main as precompute
from training.run import main as run
from training.spec import find_spec

SPEC = find_spec("statements")
ROOT = Path(embed_dataset.__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
ROWS = 90
GPU = torch.cuda.is_available()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collections") / "statements"
    assert run(["statements", "--out", str(folder.parent), "--papers", "20", "--epochs", "1"]) == 0
    return folder


@pytest.fixture(scope="module")
def file(trained: Path) -> Path:
    """Papers with one to four statements of very different lengths, one of them with an empty text."""
    rng = np.random.default_rng(0)
    words = ["ring", "field", "$x^2$", "local", "every", "is"]
    path, left, number = trained.parent / "papers.jsonl", ROWS, 0
    with path.open("w") as lines:
        while left:
            count = min(left, int(rng.integers(1, 5)))
            texts = [" ".join(rng.choice(words, int(rng.integers(1, 120)))) for _ in range(count)]
            statements = [{"type": "lemma", "text": text} for text in texts]
            lines.write(json.dumps({"arxiv_id": f"a/{number}", "title": f"T{number}", "statements": statements}) + "\n")
            left, number = left - count, number + 1
        lines.write(json.dumps({"lemmas": [""]}) + "\n")
    return path


def arguments(file: Path, trained: Path, out: Path, *more: str) -> list[str]:
    given = ["--data", str(file), "--checkpoint", str(trained), "--out", str(out), "--shard-rows", "16"]
    return ["statements", *given, *more]


@pytest.fixture(scope="module")
def whole(file: Path, trained: Path) -> Path:
    """The collection as one process makes it, without a break."""
    out = trained.parent / "whole"
    assert precompute(arguments(file, trained, out)) == 0
    return out


def same_bytes(one: Path, other: Path) -> bool:
    names = ("embeddings.safetensors", "metadata.jsonl", "info.json")
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_every_row_is_the_vector_of_its_own_statement(whole: Path, trained: Path) -> None:
    collection = Collection.open(whole)
    assert len(collection) == ROWS
    checkpoint = Checkpoint.load(trained)
    module, tokens = restore(checkpoint, SPEC), open_embedder(checkpoint, SPEC).tokens
    for row in range(ROWS):
        (ids,) = tokens.rows([collection.entry(row).text])
        with torch.no_grad():
            (want,) = module(torch.from_numpy(ids[None]), torch.ones(1, len(ids), dtype=torch.int64))
        np.testing.assert_allclose(collection.embeddings[row], want[0].numpy(), atol=1e-3)


def test_a_collection_records_its_model_and_settings(whole: Path, trained: Path, file: Path) -> None:
    info, checkpoint = Collection.open(whole).info, Checkpoint.load(trained)
    assert (info.model, info.size, info.dtype) == (checkpoint.digest, "full", "float16")
    assert (info.pooling, info.max_tokens) == (checkpoint.config["pooling"], checkpoint.config["max_tokens"])
    assert info.base["source"] == "seeded:tiny"
    entries = [Collection.open(whole).entry(row) for row in range(ROWS)]
    papers = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(papers[entry.paper]["arxiv_id"] == entry.arxiv_id for entry in entries)


def test_finished_shards_are_not_embedded_again(
    whole: Path, file: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any) -> Any:
        raise AssertionError("embedded again")

    monkeypatch.setattr(Embedder, "embed", forbidden)
    assert precompute(arguments(file, trained, whole)) == 0


@pytest.mark.slow
def test_a_killed_run_resumes_and_repeats_no_shard(whole: Path, file: Path, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    slow = (
        "import sys, time\n"
        "from training.embed_dataset import DatasetEmbedder\n"
        "run = DatasetEmbedder.run\n"
        "def slowly(self, start, stop):\n    run(self, start, stop); time.sleep(1)\n"
        "DatasetEmbedder.run = slowly\n"
        "from training.precompute import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", slow, *arguments(file, trained, out)], env=ENVIRONMENT)
    try:
        wait_for(lambda: len(list(out.glob("shards/*.json"))) >= 2, timeout_s=120)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("shards/*.json")}
    assert 2 <= len(done) < 6
    with pytest.raises(Exception, match="not"):
        Collection.open(out)
    work = DatasetEmbedder(EmbeddingJob(model="statements", checkpoint=trained, data=file, out=out, shard_rows=16))
    assert len(work.missing()) == 6 - len(done)
    assert embed_dataset.embed_shards(work) == 6 - len(done)
    assert same_bytes(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_write_the_same_bytes(
    processes: int, whole: Path, file: Path, trained: Path, tmp_path: Path
) -> None:
    """Neither 90 rows nor 6 shards are a multiple of 4 or of 3 processes times 16 rows."""
    out = tmp_path / "several"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, "-m", "training.precompute", *arguments(file, trained, out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert same_bytes(out, whole)


@pytest.mark.slow
def test_ray_writes_the_same_bytes_also_when_a_worker_is_killed(
    whole: Path, file: Path, trained: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray.data", reason="needs ray: pip install '.[ray]'")
    out = tmp_path / "ray"
    command = [sys.executable, "-m", "training.precompute", *arguments(file, trained, out, "--engine", "ray")]
    process = subprocess.Popen(command, env=ENVIRONMENT)
    killed = None
    while process.poll() is None:
        if killed is None and len(list(out.glob("shards/*.json"))) >= 1:
            killed = kill_one_actor()
        time.sleep(0.02)
    assert process.returncode == 0
    assert killed, "no worker was there to be killed"
    assert same_bytes(out, whole)


def kill_one_actor() -> int | None:
    """The id of the Ray actor that was killed."""
    for process in psutil.process_iter(["pid", "cmdline"]):
        if any("MapWorker" in part for part in process.info["cmdline"] or ()):
            process.kill()
            return int(process.info["pid"])
    return None


@pytest.mark.parametrize(("size", "rows"), [("toy", 100), ("tiny", 150)])
def test_a_size_is_the_first_so_many_statements(size: str, rows: int, trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"lemmas": [f"a{i}", "b", "c"]}) + "\n" for i in range(50)))
    out = tmp_path / size
    assert precompute(arguments(path, trained, out, "--size", size, "--dtype", "float32")) == 0
    collection = Collection.open(out)
    assert (len(collection), collection.info.dtype, collection.info.size) == (rows, "float32", size)
    assert collection.entry(98).text == "c"


def test_a_batch_that_exceeds_the_memory_is_halved_and_the_rows_stay_in_order(trained: Path) -> None:
    embedder = open_embedder(Checkpoint.load(trained), SPEC)
    texts = [f"a ring {'x ' * (i % 7)}" for i in range(40)]
    want = embedder.embed(texts)
    whole, rows = embedder.module.forward, []

    def small(ids: torch.Tensor, mask: torch.Tensor) -> Any:
        if len(ids) > 4:
            raise torch.OutOfMemoryError("pretended")
        rows.append(len(ids))
        return whole(ids, mask)

    embedder.module.forward = small  # type: ignore[method-assign]
    np.testing.assert_allclose(embedder.embed(texts), want, atol=1e-6)
    assert sum(rows) == 40


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_points_where_full_precision_does(precision: str, trained: Path) -> None:
    checkpoint = Checkpoint.load(trained)
    texts = ["Let $x$ be a ring.", "Every field is local " * 9]
    got = open_embedder(checkpoint, SPEC, precision=precision).embed(texts)
    want = open_embedder(checkpoint, SPEC).embed(texts)
    assert ((got * want).sum(1) > 0.999).all()
    assert np.abs(got - want).max() > 0


def test_a_statement_of_a_hundred_thousand_characters_is_read_from_its_start(trained: Path) -> None:
    embedder = open_embedder(Checkpoint.load(trained), SPEC)
    long = "Let $R$ be a ring. " * 6000
    assert len(long) > 100_000
    both = embedder.embed([long, long[:5000]])
    np.testing.assert_array_equal(both[0], both[1])


@pytest.mark.parametrize(
    ("change", "status", "named"),
    [
        (["--data", "none.jsonl"], 2, "expected the file with the statements"),
        (["--checkpoint", "none"], 2, "expected this file"),
        (["--store", "x"], 2, "one of them"),
        (["--shard-rows", "0"], 2, "shards of 1 or more rows"),
        (["--pooling", "mean"], 2, "the checkpoint has them"),
        (["--engine", "ray", "--workers", "0"], 2, "1 or more workers"),
        pytest.param(["--device", "cuda"], 1, "expected a GPU", marks=pytest.mark.skipif(GPU, reason="has a GPU")),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(
    change: list[str], status: int, named: str, file: Path, trained: Path, tmp_path: Path, capsys: Any
) -> None:
    assert precompute(arguments(file, trained, tmp_path / "out", *change)) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line


def test_bad_lines_and_no_lines_are_refused_before_anything_is_written(
    trained: Path, tmp_path: Path, capsys: Any
) -> None:
    for text, named in (('{"lemmas": ["a"]}\n{"lem', "bad.jsonl:2"), ('{"lemmas": [""]}\n', "found none")):
        path = tmp_path / "bad.jsonl"
        path.write_text(text)
        assert precompute(arguments(path, trained, tmp_path / "out")) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert named in line
    assert not (tmp_path / "out").exists()


def test_another_model_does_not_go_on_in_the_folder_of_the_first(
    whole: Path, file: Path, trained: Path, tmp_path: Path, capsys: Any
) -> None:
    assert run(["statements", "--out", str(tmp_path), "--papers", "20", "--epochs", "1", "--seed", "1"]) == 0
    capsys.readouterr()
    assert precompute(arguments(file, tmp_path / "statements", whole)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "rows of another run" in line
    assert "model" in line


def test_a_model_that_embeds_no_collections_is_refused(
    checkpoints: Path, file: Path, tmp_path: Path, capsys: Any
) -> None:
    assert precompute(["policy_gru", "--data", str(file), "--out", str(tmp_path / "out")]) == 2
    assert "embeds collections" in capsys.readouterr().err


def test_a_job_of_no_size_is_refused() -> None:
    with pytest.raises(InputError, match="toy"):
        EmbeddingJob(model="statements", checkpoint=Path(), data=Path(), out=Path(), size="huge")


@pytest.mark.slow
def test_training_beats_its_baselines_on_synthetic_data(tmp_path: Path, capsys: Any) -> None:
    assert run(["statements", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    assert evaluate(["statements", "--checkpoint", str(tmp_path / "statements"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["metrics"]["mrr"] > 2 * answer["baselines"]["untrained_base"]["mrr"]
    assert answer["metrics"]["mrr"] > answer["baselines"]["bm25"]["mrr"]
    assert set(answer["metrics"]) == set(answer["baselines"]["bm25"])


@pytest.mark.slow
def test_four_bits_train_what_the_full_base_then_serves(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install '.[qlora]'")
    settings = ["--papers", "60", "--epochs", "2", "--quantize", "nf4", "--optimizer", "adamw_bnb_8bit"]
    assert run(["statements", "--out", str(tmp_path), *settings]) == 0
    checkpoint = Checkpoint.load(tmp_path / "statements")
    plain = run(["statements", "--out", str(tmp_path / "plain"), "--papers", "60", "--epochs", "1"])
    assert plain == 0
    named = Checkpoint.load(tmp_path / "plain" / "statements").frozen
    assert checkpoint.frozen == named, "the base is named by its own digests, not by those of its four bits"
    restore(checkpoint, SPEC)


@pytest.mark.slow
def test_training_goes_on_from_a_state_that_holds_no_base(tmp_path: Path) -> None:
    from safetensors import safe_open

    common = ["statements", "--papers", "40", "--state-dir", str(tmp_path / "work"), "--lora_dropout", "0"]
    assert run([*common, "--epochs", "2", "--out", str(tmp_path / "first")]) == 0
    (state,) = sorted((tmp_path / "work" / "statements").glob("checkpoint-*/model.safetensors"))[-1:]
    with safe_open(state, "np") as tensors:
        assert {name.split(".")[1] for name in tensors.keys()} == {"adapters", "projection"}  # noqa: SIM118
    assert run([*common, "--epochs", "3", "--resume", "--out", str(tmp_path / "second")]) == 0
    first, second = (Checkpoint.load(tmp_path / name / "statements") for name in ("first", "second"))
    assert second.step > first.step

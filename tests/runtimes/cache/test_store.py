"""The store: entries are read back, in this process or the next; another model's store is refused."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtimes.cache.store import Store, buckets
from runtimes.errors import ArtifactError

IDENTITY = {"model": "a" * 64, "tokenizer": "b" * 64, "max_tokens": 128}


def lengths_of(texts: Sequence[str]) -> list[np.ndarray]:
    return [np.array([len(text)], np.float32) for text in texts]


class Model:
    """Says how long a text is, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        self.asked += texts
        return lengths_of(texts)


@pytest.mark.parametrize("entry", [
    np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros((0, 3), np.int64), np.float16([1.5]), np.array(3.0),
])  # fmt: skip
def test_an_entry_survives_the_process(entry: np.ndarray, tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.namespace("context", IDENTITY).put(["నమస్కారం"], [entry])
    with Store(tmp_path) as store:
        (found,) = store.namespace("context", IDENTITY).get(["నమస్కారం"])
    assert found is not None
    assert (found.dtype, found.shape) == (entry.dtype, entry.shape)
    np.testing.assert_array_equal(found, entry)


@pytest.mark.parametrize("folder", [True, False])
def test_a_model_is_asked_once_for_each_distinct_text(folder: bool, tmp_path: Path) -> None:
    model = Model()
    with Store(tmp_path if folder else None) as store:
        namespace = store.namespace("context", IDENTITY)
        first = namespace.complete(["one", "three", "one"], model)
        again = namespace.complete(["three", "seven!!"], model)
    assert model.asked == ["one", "three", "seven!!"]
    assert [entry[0] for entry in (*first, *again)] == [3, 5, 3, 5, 7]


@pytest.mark.parametrize("key", sorted(IDENTITY))
def test_another_models_store_is_refused_in_one_line(key: str, tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.namespace("context", IDENTITY)
        store.namespace("emotion", {**IDENTITY, key: "other"})  # another namespace belongs to another model
    other = {**IDENTITY, key: 64 if key == "max_tokens" else "c" * 64}
    with Store(tmp_path) as store, pytest.raises(ArtifactError, match=key) as caught:
        store.namespace("context", other)
    assert "\n" not in str(caught.value)


def test_the_key_is_the_model_and_the_exact_text() -> None:
    store = Store()
    namespace = store.namespace("context", IDENTITY)
    texts = ["a", "a ", "A", "\u00e1", "a\u0301", ""]  # the same letter in two spellings is two texts
    assert len({namespace.key(text) for text in texts}) == len(texts)
    assert namespace.key("a") != store.namespace("context", {**IDENTITY, "max_tokens": 64}).key("a")
    assert namespace.key("a") != store.namespace("emotion", IDENTITY).key("a")


def test_memory_forgets_what_was_not_used_for_longest() -> None:
    store = Store(memory_entries=2)
    namespace = store.namespace("context", IDENTITY)
    namespace.put(["a", "b"], lengths_of(["a", "b"]))
    namespace.get(["a"])
    namespace.put(["c"], lengths_of(["c"]))
    assert [entry is None for entry in namespace.get(["a", "b", "c"])] == [False, True, False]


def test_what_memory_forgot_is_still_in_the_folder(tmp_path: Path) -> None:
    with Store(tmp_path, memory_entries=1) as store:
        namespace = store.namespace("context", IDENTITY)
        namespace.put(["a", "bb"], lengths_of(["a", "bb"]))
        assert [entry is not None and entry[0] for entry in namespace.get(["a", "bb"])] == [1, 2]


def test_a_folder_with_another_manifest_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text('{"format": "other"}')
    with Store(tmp_path) as store, pytest.raises(ArtifactError, match="expected format"):
        store.namespace("context", IDENTITY)


def test_missing_texts_are_counted_with_the_remedy(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        namespace = store.namespace("context", IDENTITY)
        namespace.put(["a"], lengths_of(["a"]))
        assert namespace.missing(["b", "a", "b"]) == ["b"]
        with pytest.raises(ArtifactError, match="expected 2 texts, found 1 of them; run precompute"):
            namespace.require(["a", "b"], "run precompute")


def test_a_reader_sees_what_another_process_wrote(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        namespace = store.namespace("context", IDENTITY)
        assert namespace.get(["x"]) == [None]
        code = (
            "import numpy as np; from pathlib import Path; from runtimes.cache.store import Store\n"
            f"with Store(Path({str(tmp_path)!r})) as s: s.namespace('context', {IDENTITY!r}).put(['x'], [np.ones(2)])"
        )
        subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
        (found,) = namespace.get(["x"])
    assert found is not None


def test_namespaces_that_processes_add_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from runtimes.cache.store import Store\n"
        f"with Store(Path({str(tmp_path)!r})) as store:\n"
        "    for i in range(40):\n"
        f"        store.namespace(f'{{i}} of {{sys.argv[1]}}', {IDENTITY!r}); store.namespace(str(i), {IDENTITY!r})"
    )
    command, root = [sys.executable, "-c", code], Path(__file__).parents[3]
    processes = [subprocess.Popen([*command, str(i)], cwd=root, stderr=subprocess.PIPE, text=True) for i in range(4)]
    assert [process.communicate()[1] for process in processes] == [""] * 4
    assert len(json.loads((tmp_path / "store.json").read_text())["shelves"]) == 40 * 4 + 40


def test_a_folder_that_is_a_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="store"), Store(tmp_path / "file"):
        pass


@given(st.lists(st.integers(0, 60), max_size=50), st.integers(1, 200))
def test_buckets_hold_every_text_once_and_no_more_padding_than_asked(lengths: list[int], padded_size: int) -> None:
    texts = [str(i) for i in range(len(lengths))]
    found = list(buckets(texts, lengths, padded_size))
    assert sorted(text for bucket in found for text in bucket) == sorted(texts)
    for bucket in found:
        longest = max(lengths[int(text)] for text in bucket)
        assert len(bucket) == 1 or len(bucket) * longest <= padded_size

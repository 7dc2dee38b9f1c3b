"""Text for an H-Net: documents of a folder, pieces that begin no code point in its middle, ragged batches."""

from pathlib import Path

import numpy as np
import pytest

from runtimes.errors import InputError
from runtimes.pipelines.hnet.byte_text import BOS
from training.models.hnet.data import IGNORED, Corpus, Pieces, batch_of, check_compression, pack, read_corpora


def write(folder: Path, **files: str | bytes) -> Path:
    for name, text in files.items():
        path = folder / name.replace("_", ".")
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def documents(corpus: Corpus) -> list[str]:
    return [corpus.text[a:b].tobytes().decode() for a, b in zip(corpus.offsets, corpus.offsets[1:], strict=False)]


def test_texts_end_at_blank_lines_or_lines_and_empty_ones_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, train_te="ఒక\nరెండు\n\n\nమూడు\n\n", train2_te="నాలుగు", dev_te="ఐదు\nఆరు")
    train, valid, lines = read_corpora(tmp_path, "document")
    assert documents(train) == ["ఒక\nరెండు", "మూడు", "నాలుగు"]
    assert documents(valid) == ["ఐదు\nఆరు"]
    assert lines == ["3 documents (52 bytes) to train on, 1 documents (19 bytes) held out"]
    assert documents(read_corpora(tmp_path, "line")[1]) == ["ఐదు", "ఆరు"]


def test_plain_texts_are_divided_80_10_10_deterministically(tmp_path: Path) -> None:
    write(tmp_path, a_txt="\n\n".join(f"a{i}" for i in range(60)), b_txt="\n\n".join(f"b{i}" for i in range(40)))
    train, valid, _ = read_corpora(tmp_path, "document")
    assert (len(documents(train)), len(documents(valid))) == (80, 10)
    assert not set(documents(train)) & set(documents(valid))
    again = read_corpora(tmp_path, "document")
    assert documents(again[0]) == documents(train)


@pytest.mark.parametrize(
    ("files", "unit", "message"),
    [
        ({}, "document", "found 0 texts to train on and 0 held out"),
        ({"train_te": "a"}, "document", "found 1 texts to train on and 0 held out"),
        ({"a_txt": "a\n\nb"}, "document", "with 3 or more texts"),
        (
            {"train_te": b"a\xe0\xb0", "valid_te": b"a"},
            "document",
            "train.te: expected UTF-8, found byte 0xe0 at 1 of 3",
        ),
        ({"train_te": "a", "valid_te": "b"}, "word", "unit of document, line; found 'word'"),
    ],
)
def test_a_folder_without_enough_text_is_refused(
    tmp_path: Path, files: dict[str, str], unit: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_corpora(write(tmp_path, **files), unit)


@pytest.mark.parametrize("phase", [None, np.array([3, 0, 7])])
def test_pieces_hold_every_byte_once_and_begin_no_code_point_in_its_middle(phase: np.ndarray | None) -> None:
    texts = ["తెలుగు ఒక ద్రావిడ భాష.", "abc", "😀" * 7]
    corpus = Corpus.of([text.encode() for text in texts])
    pieces = corpus.pieces(10, phase)
    assert pieces[0, 0] == 0
    assert pieces[-1, 1] == len(corpus.text)
    assert (pieces[1:, 0] == pieces[:-1, 1]).all()
    assert (pieces[:, 1] - pieces[:, 0]).max() <= 13
    for begin, end in pieces:
        corpus.text[begin:end].tobytes().decode()
        assert np.searchsorted(corpus.offsets, begin, "right") == np.searchsorted(corpus.offsets, end, "left")


def test_a_batch_reads_bos_before_its_bytes() -> None:
    corpus = Corpus.of([b"hello", b"you"])
    batch = batch_of(corpus, corpus.pieces(8), epoch=3)
    assert batch["byte_ids"].tolist() == [[BOS, *b"hell"], [BOS, *b"yo", 0, 0]]
    assert batch["labels"].tolist() == [list(b"hello"), [*b"you", IGNORED, IGNORED]]
    assert batch["lengths"].tolist() == [5, 3]
    assert int(batch["epoch"]) == 3


def test_an_epoch_is_part_of_a_pass_in_which_nothing_comes_twice() -> None:
    corpus = Corpus.of([bytes(range(32, 122)) * 4] * 6)
    data = Pieces(corpus, 30, step_rows=2, seed=0, epoch_bytes=600)
    shown = []
    assert (len(data), data.epochs_a_pass) == (20, 3)
    for epoch in range(3):
        data.set_epoch(epoch)
        shown += [tuple(piece) for piece in data.pieces]
    assert len(set(shown)) == 60
    data.set_epoch(3)
    assert {tuple(piece) for piece in data.pieces} - set(shown), "the next pass is cut elsewhere"
    first = data.pieces.copy()
    data.set_epoch(0)
    data.set_epoch(3)
    assert (data.pieces == first).all()


def test_rows_laid_end_to_end_become_rows_and_lengths() -> None:
    ids, lengths = pack([0, 2, 5], [7, 8, 1, 2, 3])
    assert ids.tolist() == [[7, 8, 0], [1, 2, 3]]
    assert lengths.tolist() == [2, 3]
    for wrong in ([0, 2], [1, 5], [0, 2, 2, 5], [0]):
        with pytest.raises(InputError, match="offsets that rise from 0 to 5"):
            pack(wrong, [7, 8, 1, 2, 3])


@pytest.mark.parametrize("n_compress", ["1", "5 1", "2 5", "1 5 5", "1 x", ""])
def test_a_compression_that_does_not_fit_the_stages_is_refused(n_compress: str) -> None:
    with pytest.raises(InputError, match="n_compress: expected"):
        check_compression(n_compress, 1)
    assert check_compression("1 3 9", 2) == [1, 3, 9]

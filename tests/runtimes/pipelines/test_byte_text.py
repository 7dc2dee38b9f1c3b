"""Bytes of UTF-8: valid requests, the bytes that may follow, and the beginnings of segments."""

import numpy as np
import pytest

from runtimes.errors import InputError
from runtimes.pipelines.hnet.byte_text import BOS, Utf8Writer, choose, decode_utf8, padded_rows, read_request, segments


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"text": ""}, "1 to 1,023 bytes, found an empty text"),
        ({"text": "a" * 1_000_000}, "1 to 1,023 bytes, found 1,000,000 bytes; send it in pieces"),
        ({"text": "\ud800"}, "half of a surrogate pair at 0"),
        ({"text": 3}, 'expected {"text"'),
        ("తెలుగు", 'expected {"text"'),
        ({"text": "a", "more": 1}, 'expected {"text"'),
        ({"bytes": [224, 176]}, "UTF-8, found byte 0xe0 at 0 of 2; the text ends inside a code point"),
        ({"bytes": [176, 65]}, "UTF-8, found byte 0xb0 at 0 of 2"),
        ({"bytes": [65, 256]}, "0 to 255, found 256 at 1"),
        ({"bytes": [65, -1]}, "0 to 255, found -1 at 1"),
        ({"bytes": [65, True]}, "0 to 255, found True at 1"),
        ({"bytes": [65, 1.0]}, "0 to 255, found 1.0 at 1"),
        ({"bytes": []}, "found an empty text"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(request_: object, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_request(request_, 2, 1023)
    assert message in str(caught.value)
    assert str(caught.value).startswith("request 2")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_one_byte_and_the_longest_text_are_read() -> None:
    assert read_request({"text": "a"}, 0, 1023) == b"a"
    assert read_request({"bytes": [224, 176, 149]}, 0, 3) == "క".encode()
    with pytest.raises(InputError, match="found 4 bytes"):
        read_request({"text": "abcd"}, 0, 3)


def test_a_file_cut_inside_a_code_point_says_where() -> None:
    with pytest.raises(InputError, match=r"f\.te: expected UTF-8, found byte 0xe0 at 3 of 5; the text ends inside"):
        decode_utf8("కక".encode()[:5], "f.te")


def test_rows_begin_with_bos_and_are_as_long_as_they_say() -> None:
    ids, lengths = padded_rows([b"ab", b"c"])
    assert ids.tolist() == [[BOS, 97, 98], [BOS, 99, 0]]
    assert lengths.tolist() == [3, 2]


def valid(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def can_be_completed(begun: bytes) -> bool:
    """By Python's own decoder: some code point begins so."""
    try:
        begun.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return True


def test_a_byte_is_allowed_exactly_where_pythons_decoder_takes_it() -> None:
    begun = [b""]
    for _ in range(3):
        longer = []
        for before in begun:
            writer = Utf8Writer(4)
            for byte in before:
                writer.write(byte)
            allowed = writer.allowed()
            for byte in range(256):
                taken = can_be_completed(before + bytes([byte]))
                assert allowed[byte] == (taken or (byte == BOS and not before)), (before, byte)
                if taken and not valid(before + bytes([byte])):
                    longer.append(before + bytes([byte]))
        begun = [longer[i] for i in np.linspace(0, len(longer) - 1, min(60, len(longer))).astype(int)]


def test_a_code_point_of_four_bytes_comes_whole() -> None:
    writer = Utf8Writer(5)
    assert [writer.write(byte) for byte in "😀".encode()] == ["", "", "", "😀"]
    assert not writer.full
    writer.write(65)
    assert writer.full


def test_a_text_ends_with_bos_or_before_what_does_not_fit() -> None:
    assert Utf8Writer(9).ends_with(BOS)
    assert Utf8Writer(2).ends_with(0xE0)
    assert not Utf8Writer(3).ends_with(0xE0)
    assert Utf8Writer(3).ends_with(0xF0)
    assert not Utf8Writer(1).ends_with(65)


def test_a_byte_that_may_not_follow_is_refused() -> None:
    writer = Utf8Writer(9)
    writer.write(0xE0)
    for byte in (0x80, 0x41, BOS):
        with pytest.raises(ValueError, match="cannot follow"):
            writer.write(byte)


def test_choosing_keeps_to_what_is_allowed_and_to_the_likeliest() -> None:
    rng = np.random.default_rng(0)
    logits = np.arange(256.0)
    allowed = np.zeros(256, bool)
    allowed[[3, 50, 90, 200]] = True
    assert choose(logits, allowed, rng, temperature=0, top_k=0) == 200
    assert {choose(logits / 100, allowed, rng, temperature=1, top_k=2) for _ in range(60)} == {90, 200}
    drawn = [choose(logits * 0, allowed, rng, temperature=1, top_k=0) for _ in range(400)]
    assert set(drawn) == {3, 50, 90, 200}
    assert 60 < drawn.count(50) < 140


def test_a_segment_begins_at_the_byte_that_says_so() -> None:
    text = "aకb".encode()
    assert list(segments(text, np.array([0, 1, 0, 0, 1], bool))) == [
        {"text": "a", "begin": 0, "end": 1, "code_point": 0},
        {"text": "క", "begin": 1, "end": 4, "code_point": 1},
        {"text": "b", "begin": 4, "end": 5, "code_point": 2},
    ]
    assert [part["begin"] for part in segments(text, np.zeros(5, bool))] == [0]
    inside = list(segments(text, np.array([1, 0, 1, 0, 0], bool)))
    assert [(part["begin"], part["end"], part["code_point"]) for part in inside] == [(0, 2, 0), (2, 5, 2)]

"""Text as the bytes of its UTF-8: requests to a byte language model, and which byte may follow which."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from runtimes.errors import InputError

BOS = 254  # begins a text, and ends one that is generated; no byte of UTF-8
VOCABULARY = 256
# First bytes of a code point: (from, to, how many bytes follow, least and most of the next). Unicode 16, table 3-7.
_LEADS = (
    (0x00, 0x7F, 0, 0, 0),
    (0xC2, 0xDF, 1, 0x80, 0xBF),
    (0xE0, 0xE0, 2, 0xA0, 0xBF),
    (0xE1, 0xEC, 2, 0x80, 0xBF),
    (0xED, 0xED, 2, 0x80, 0x9F),
    (0xEE, 0xEF, 2, 0x80, 0xBF),
    (0xF0, 0xF0, 3, 0x90, 0xBF),
    (0xF1, 0xF3, 3, 0x80, 0xBF),
    (0xF4, 0xF4, 3, 0x80, 0x8F),
)


def decode_utf8(data: bytes, where: str) -> str:
    """The text of these bytes; `InputError` names the first byte that is no UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        cut = "; the text ends inside a code point" if error.reason == "unexpected end of data" else ""
        raise InputError(
            f"{where}: expected UTF-8, found byte 0x{data[error.start]:02x} at {error.start} of {len(data)}{cut}"
        ) from error


def check_text(text: str | bytes, where: str, limit: int, *, least: int = 1) -> bytes:
    """The bytes of a text of `least` to `limit` bytes; `InputError` for any other, and for bytes that are no UTF-8."""
    if isinstance(text, bytes):
        decode_utf8(text, where)
    else:
        try:
            text = text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: expected text, found half of a surrogate pair at {error.start}") from error
    if not least <= len(text) <= limit:
        found = f"{len(text):,} bytes; send it in pieces" if text else "an empty text"
        raise InputError(f"{where}: expected a text of {least} to {limit:,} bytes, found {found}")
    return text


def read_request(request: Any, row: int, limit: int) -> bytes:
    """The bytes that `{"text": ...}` or `{"bytes": [...]}` contains, at most `limit`; `InputError` for any other."""
    where = f"request {row}"
    if isinstance(request, dict) and request.keys() == {"text"} and isinstance(request["text"], str):
        return check_text(request["text"], where, limit)
    if isinstance(request, dict) and request.keys() == {"bytes"} and isinstance(request["bytes"], list):
        return check_text(_as_bytes(request["bytes"], where), where, limit)
    raise InputError(f'{where}: expected {{"text": "..."}} or {{"bytes": [...]}}, found {ascii(request)[:60]}')


def _as_bytes(numbers: Sequence[Any], where: str) -> bytes:
    for place, number in enumerate(numbers):
        if type(number) is not int or not 0 <= number < VOCABULARY:
            raise InputError(f"{where}, bytes: expected whole numbers from 0 to 255, found {number!r} at {place}")
    return bytes(numbers)


def padded_rows(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """(byte_ids int64 [texts, longest + 1] that begin with BOS and end in zeros, lengths int64 with BOS counted)."""
    lengths = np.array([len(text) + 1 for text in texts], np.int64)
    ids = np.zeros((len(texts), int(lengths.max())), np.int64)
    for row, text in enumerate(texts):
        ids[row, 1 : len(text) + 1] = np.frombuffer(text, np.uint8)
    ids[:, 0] = BOS
    return ids, lengths


class Utf8Writer:
    """The bytes that may come next in UTF-8; between code points also BOS, which ends the text."""

    def __init__(self, limit: int) -> None:
        self.left = limit
        self.pending = b""
        self._follow = 0  # bytes the code point still lacks
        self._next = (0x80, 0xBF)

    def allowed(self) -> np.ndarray:
        """bool [256]"""
        result = np.zeros(VOCABULARY, bool)
        if self._follow:
            result[self._next[0] : self._next[1] + 1] = True
            return result
        for first, last, *_ in _LEADS:
            result[first : last + 1] = True
        result[BOS] = True
        return result

    def ends_with(self, byte: int) -> bool:
        """Whether the text ends instead of this byte: it is BOS, or begins a code point that does not fit any more."""
        if self._follow:
            return False
        return byte == BOS or self.left <= next(lead[2] for lead in _LEADS if lead[0] <= byte <= lead[1])

    def write(self, byte: int) -> str:
        """The code point that this byte completes, or nothing yet."""
        if not self.allowed()[byte] or byte == BOS:
            raise ValueError(f"byte 0x{byte:02x} cannot follow {self.pending!r}")
        self.left -= 1
        self.pending += bytes([byte])
        if self._follow:
            self._follow, self._next = self._follow - 1, (0x80, 0xBF)
        else:
            self._follow, *span = next(lead[2:] for lead in _LEADS if lead[0] <= byte <= lead[1])
            self._next = (span[0], span[1])
        if self._follow:
            return ""
        text, self.pending = self.pending.decode(), b""
        return text

    @property
    def full(self) -> bool:
        """True where nothing further fits."""
        return self.left < 1


def choose(logits: np.ndarray, allowed: np.ndarray, rng: np.random.Generator, *, temperature: float, top_k: int) -> int:
    """A byte of those allowed: the likeliest at temperature 0, else drawn among the `top_k` likeliest (0: all)."""
    scores = np.where(allowed, logits.astype(np.float64), -np.inf)
    if temperature == 0:
        return int(scores.argmax())
    if 0 < top_k < allowed.sum():
        scores[scores < np.partition(scores, -top_k)[-top_k]] = -np.inf
    weights = np.exp((scores - scores.max()) / temperature)
    return int(rng.choice(len(weights), p=weights / weights.sum()))


def segments(text: bytes, begins: np.ndarray) -> Iterator[dict[str, Any]]:
    """The segments of a text: each begins at a byte where `begins` [bytes] is true; the first at the first byte.

    `begin` and `end` count bytes, `code_point` those that begin before the segment. A segment that holds no whole text
    has the characters that its bytes form, and `�` for the rest.
    """
    starts = np.flatnonzero(begins)
    starts = starts if len(starts) and starts[0] == 0 else np.concatenate([[0], starts])
    before = np.cumsum((np.frombuffer(text, np.uint8) & 0xC0) != 0x80)
    for begin, end in zip(starts.tolist(), [*starts[1:].tolist(), len(text)], strict=True):
        yield {
            "text": text[begin:end].decode(errors="replace"),
            "begin": begin,
            "end": end,
            "code_point": int(before[begin - 1]) if begin else 0,
        }

"""The texts that a language model is quantized on: those in a file, or those in its checkpoint."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.artifact import sha256_file
from runtimes.errors import InputError
from training.language_model import LanguageModel

SHORTEST = 2  # tokens; a shorter text has no token to predict


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationTexts:
    """`samples` rows of up to `tokens` tokens, from `file` or, without one, from the checkpoint.

    A file is JSON lines, each an object with a `text`, or plain text whose documents are separated by blank lines.
    """

    file: Path | None = None
    samples: int = 256
    tokens: int = 512

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("tokens", SHORTEST)):
            if getattr(self, name) < least:
                raise InputError(f"--calibration-{name}: expected {least} or more, found {getattr(self, name)}")

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that the bytes of an artifact depend on."""
        file = None
        if self.file is not None:
            _require_file(self.file)
            file = sha256_file(self.file)
        return {"file": file, "samples": self.samples, "tokens": self.tokens}

    def rows(self, language_model: LanguageModel) -> list[np.ndarray]:
        """Token ids, int64 [tokens] each; `InputError` if there are none.

        For a model that embeds, a text is a row. For a model that generates, rows are cut from all texts joined, as in
        its training.
        """
        tokens = min(self.tokens, language_model.window)
        if self.file is None:
            texts: Sequence[np.ndarray] = language_model.texts
        else:
            read = list(read_texts(self.file))
            texts = [np.array(ids, np.int64) for ids in language_model.tokenizer(read).input_ids] if read else []
            if language_model.task == "generate" and texts:
                line = np.concatenate(texts)
                texts = [line[start : start + tokens] for start in range(0, len(line), tokens)]
        found = [text[:tokens] for text in texts if len(text) >= SHORTEST]
        if not found:
            raise InputError(f"{self.file or 'the checkpoint'}: expected texts to quantize on, found none")
        spread = np.linspace(0, len(found) - 1, min(self.samples, len(found))).astype(int)
        return [found[i] for i in spread]


def read_texts(path: Path) -> Iterator[str]:
    """The texts of a calibration file; `InputError` for a line without a text."""
    _require_file(path)
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected text in UTF-8, found {error}") from error
    if path.suffix != ".jsonl":
        yield from (document.strip() for document in content.split("\n\n") if document.strip())
        return
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            yield _text(line, f"{path}:{number}")


def _text(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: expected a JSON object with a 'text', found {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise InputError(f"{where}: expected a JSON object with a 'text', found {ascii(row)[:80]}")
    return str(row["text"])


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path}: expected a file of calibration texts, found none")

"""RAGTruth: prompts, the answers that language models gave to them, and where those answers hallucinate.

Source: Niu et al., RAGTruth, ACL 2024. `response.jsonl` has a line for each answer, `source_info.jsonl` one for each
prompt; the spans that ReDeEP added to both are read where they are.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.errors import InputError, one_line
from runtimes.host.cli import existing_folder
from runtimes.pipelines.hallucination.grounding import Span, Spans

RESPONSES, SOURCES = "response.jsonl", "source_info.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """An answer to a prompt.

    request       as the pipeline takes it
    hallucinated  spans of the answer in characters
    """

    request: dict[str, Any]
    hallucinated: Spans
    source: str
    split: str

    @property
    def text(self) -> str:
        """The request as canonical JSON, the key of its features."""
        return json.dumps(self.request, sort_keys=True, ensure_ascii=False)


def read_ragtruth(folder: Path, generator: str) -> list[Example]:
    """All answers, or those of one `generator`; `InputError` names the file and the line of an error."""
    existing_folder(folder, f"{RESPONSES} and {SOURCES}")
    sources = {}
    for where, row in _lines(folder / SOURCES):
        _require(where, row, {"source_id": (str, int), "prompt": (str,)})
        sources[str(row["source_id"])] = row
    examples, generators = [], set()
    for where, row in _lines(folder / RESPONSES):
        _require(where, row, {"source_id": (str, int), "model": (str,), "response": (str,), "labels": (list,)})
        generators.add(row["model"])
        if generator in ("", row["model"]):
            examples.append(_example(where, row, sources))
    if not examples:
        raise InputError(f"{folder}: expected answers of '{generator}', found those of {', '.join(sorted(generators))}")
    return examples


def _example(where: str, row: dict[str, Any], sources: dict[str, dict[str, Any]]) -> Example:
    source = sources.get(str(row["source_id"]))
    if source is None:
        raise InputError(f"{where}: expected source_id of {SOURCES}, found '{row['source_id']}'")
    request = {"prompt": source["prompt"], "answer": row["response"]}
    for name, spans in (("spans", row.get("response_spans")), ("prompt_spans", source.get("prompt_spans"))):
        if spans:
            request[name] = spans
    return Example(
        request=request,
        hallucinated=tuple(_label(where, label, row["response"]) for label in row["labels"]),
        source=str(row["source_id"]),
        split=str(row.get("split", "")),
    )


def _label(where: str, label: Any, answer: str) -> Span:
    """The span of a label; `InputError` unless it is inside the answer and quotes it."""
    if not isinstance(label, dict) or any(type(label.get(name)) is not int for name in ("start", "end")):
        raise InputError(f"{where}: expected labels with start and end, found {ascii(label)[:80]}")
    start, end = label["start"], label["end"]
    if not 0 <= start < end <= len(answer):
        raise InputError(f"{where}: expected a label with 0 <= start < end <= {len(answer)}, found {start} and {end}")
    if "text" in label and label["text"] != answer[start:end]:
        raise InputError(
            f"{where}: expected the label at {start} to quote the answer ({ascii(answer[start:end])[:40]}), "
            f"found {ascii(label['text'])[:40]}"
        )
    return start, end


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) for each line of JSON."""
    if not path.is_file():
        raise InputError(f"expected {path.name} in {path.parent}, found none")
    with path.open("rb") as stream:  # decoded line by line, so that the one that is no UTF-8 can be named
        for number, line in enumerate(stream, 1):
            where = f"{path}, line {number}"
            try:
                row = json.loads(line.decode()) if line.strip() else None
            except ValueError as error:
                raise InputError(f"{where}: expected JSON in UTF-8, found {one_line(error, 80)}") from error
            if isinstance(row, dict):
                yield where, row
            elif row is not None:
                raise InputError(f"{where}: expected an object, found {ascii(row)[:80]}")


def _require(where: str, row: dict[str, Any], kinds: dict[str, tuple[type, ...]]) -> None:
    for name, allowed in kinds.items():
        if type(row.get(name)) not in allowed:
            raise InputError(f"{where}: expected '{name}', found {ascii(row.get(name))[:60]}")


def train_and_valid(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """By the data's own split where it has one, else with a share of the sources held out."""
    train = [example for example in examples if example.split == "train"]
    valid = [example for example in examples if example.split == "test"]
    if train and valid and len(train) + len(valid) == len(examples):
        return train, valid
    held = held_out_sources([example.source for example in examples], share, seed)
    return (
        [example for example in examples if example.source not in held],
        [example for example in examples if example.source in held],
    )


def held_out_sources(sources: Sequence[str], share: float, seed: int) -> set[str]:
    """A share of the distinct sources, at least one on either side."""
    names = sorted(set(sources))
    if not 0 < share < 1 or len(names) < 2:
        raise InputError(
            f"--set valid_share: expected 2 or more sources and a share in 0..1, found {len(names)}, {share}"
        )
    count = min(max(1, round(share * len(names))), len(names) - 1)
    return {names[i] for i in np.random.default_rng(seed).permutation(len(names))[:count]}


def synthetic_examples(seed: int, count: int) -> list[Example]:
    """Synthetic reports about bridges; a hallucinated sentence has facts that are not in the report."""
    rng = np.random.default_rng(seed)
    return [_synthetic(rng, number) for number in range(count)]


def write_sample(folder: Path, seed: int) -> list[Path]:
    """Writes 120 synthetic answers to response.jsonl and source_info.jsonl, RAGTruth's form; the paths written."""
    examples = synthetic_examples(seed, 120)
    sources = [{"source_id": each.source, "prompt": each.request["prompt"]} for each in examples]
    responses = [
        {
            "source_id": each.source,
            "model": "synthetic",
            "response": each.request["answer"],
            "response_spans": each.request["spans"],
            "labels": [{"start": start, "end": end} for start, end in each.hallucinated],
        }
        for each in examples
    ]
    written = {folder / RESPONSES: responses, folder / SOURCES: sources}
    for path, rows in written.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return list(written)


def _synthetic(rng: np.random.Generator, number: int) -> Example:
    facts = {
        "opened": f"It was opened in {rng.integers(1850, 2020)}.",
        "long": f"It is {rng.integers(90, 2000)} metres long.",
        "lanes": f"It carries {rng.integers(2, 9)} lanes of traffic.",
        "built": f"It was built by {rng.choice(['Arup', 'Roebling', 'Eiffel', 'Dorman Long'])}.",
        "painted": f"It is painted {rng.choice(['grey', 'red', 'green'])}.",
    }
    order = [str(name) for name in rng.permutation(list(facts))]
    known, made_up = order[:3], order[3:]
    name = f"bridge number {rng.integers(10, 99)}"
    prompt = f"Report on {name}. " + " ".join(facts[fact] for fact in known) + " Summarise the report."
    printed = [known[0], known[1], made_up[0] if rng.random() < 0.5 else known[2]]
    answer, hallucinated, spans = "", [], []
    for fact in printed:
        span = (len(answer), len(answer) + len(facts[fact]))
        spans.append(list(span))
        hallucinated += [span] if fact in made_up else []
        answer += facts[fact] + " "
    request = {"prompt": prompt, "answer": answer.rstrip(), "spans": spans}
    return Example(request=request, hallucinated=tuple(hallucinated), source=str(number), split="")

"""Dialogues as samples: the history before a supporter's turn, and the strategy of that turn.

Three forms are read: ESConv's JSON, its variant with Telugu keys, and JSON lines of prepared samples.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.artifact import read_json
from runtimes.errors import InputError, one_line
from runtimes.pipelines.strategy.dialogue import EMOTIONS, ROOT, STRATEGIES, Dialogue, Turn, read_dialogue, strategy_id

# English names of the keys and speakers of the Telugu variant.
TELUGU = {
    "సంభాషణ": "dialog",
    "వక్త": "speaker",
    "విషయం": "content",
    "వచనం": "content",
    "వ్యాఖ్యానం": "annotation",
    "వ్యూహం": "strategy",
    "సహాయార్థి": "seeker",
    "అన్వేషకుడు": "seeker",
    "సహాయకుడు": "supporter",
    "మద్దతుదారు": "supporter",
}
START = "<START>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A history and the id of the strategy that follows it; `group` names the dialogue that it was cut from."""

    dialogue: Dialogue
    label: int
    group: str


def read_samples(path: Path, labels: str, history: int) -> list[Sample]:
    """The samples of a .json or .jsonl file with their newest `history` turns; `InputError` for another form."""
    samples = list(_json_lines(path, labels) if path.suffix == ".jsonl" else _esconv(path, labels))
    if not samples:
        raise InputError(f"{path}: expected dialogues with supporter strategies, found none")
    return [
        Sample(dialogue=sample.dialogue.newest(history), label=sample.label, group=sample.group) for sample in samples
    ]


def train_and_valid(
    data: Path, labels: str, history: int, share: float, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """Training and validation samples: LABELS_train and LABELS_valid of a folder, or one file split by dialogue."""
    if data.is_file():
        return split_by_dialogue(read_samples(data, labels, history), share, seed)
    found = {part: _file(data, f"{labels}_{part}") for part in ("train", "valid")}
    if found["train"] and found["valid"]:
        return read_samples(found["train"], labels, history), read_samples(found["valid"], labels, history)
    single = found["train"] or found["valid"] or _file(data, labels)
    if single is None:
        raise InputError(f"expected {labels}_train.jsonl and {labels}_valid.jsonl, or one of them, in {data}")
    return split_by_dialogue(read_samples(single, labels, history), share, seed)


def split_by_dialogue(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(training, validation) with every dialogue on one side; about `share` of the dialogues are held out."""
    groups = sorted({sample.group for sample in samples})
    random.Random(seed).shuffle(groups)
    count = max(1, round(share * len(groups)))
    if count >= len(groups):
        raise InputError(f"expected at least two dialogues to hold one out, found {len(groups)}")
    held_out = set(groups[:count])
    return (
        [sample for sample in samples if sample.group not in held_out],
        [sample for sample in samples if sample.group in held_out],
    )


def synthetic_samples(seed: int, dialogues: int, labels: str) -> list[Sample]:
    """Synthetic dialogues in which the seeker's last emotion determines the next strategy in nine cases of ten."""
    rng = np.random.default_rng(seed)
    count = len(STRATEGIES[labels])
    samples = []
    for number in range(dialogues):
        turns: list[Turn] = [Turn(speaker="start", text=START)]
        emotions = [0]
        for _ in range(int(rng.integers(3, 7))):
            emotion = int(rng.integers(len(EMOTIONS)))
            turns.append(Turn(speaker="seeker", text=f"I feel {EMOTIONS[emotion].lower()} today."))
            emotions.append(emotion)
            label = (emotion if rng.random() < 0.9 else int(rng.integers(len(EMOTIONS)))) % count
            samples.append(_synthetic(turns, emotions, label, f"{number}"))
            turns.append(Turn(speaker="supporter", text=f"{STRATEGIES[labels][label]}.", strategy=label))
            emotions.append(0)
    return samples


def write_sample(folder: Path, seed: int) -> list[Path]:
    """Writes 150 synthetic dialogues to esconv.jsonl, a sample a line as `--data` reads them; the paths written."""
    path = folder / "esconv.jsonl"
    with path.open("w", encoding="utf-8") as lines:
        for sample in synthetic_samples(seed, 150, "esconv"):
            dialogue = sample.dialogue
            row = {
                "turns": [asdict(turn) for turn in dialogue.turns],
                "edges": dialogue.edges,
                "emotion_logits": None if dialogue.emotion_logits is None else dialogue.emotion_logits.tolist(),
                "label": sample.label,
            }
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    return [path]


def _synthetic(turns: Sequence[Turn], emotions: Sequence[int], label: int, group: str) -> Sample:
    logits = np.zeros((len(turns), len(EMOTIONS)), np.float32)
    logits[np.arange(len(turns)), list(emotions)] = 6
    edges = ((0, 1, ROOT), *((i, i + 1, 1) for i in range(1, len(turns))))
    return Sample(
        dialogue=Dialogue(turns=tuple(turns), edges=edges, emotion_logits=logits).newest(2), label=label, group=group
    )


def _json_lines(path: Path, labels: str) -> Iterator[Sample]:
    """Samples without ids: a dialogue begins where a history begins anew with <START>."""
    group, before = 0, 0
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                dialogue, label = _json_line(line, labels, f"{path.name}:{number}")
                fresh = dialogue.turns[0].speaker == "start"
                group += fresh and not 0 < before < len(dialogue.turns)
                before = len(dialogue.turns) if fresh else 0
                yield Sample(dialogue=dialogue, label=label, group=str(group))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected JSON lines in UTF-8, found {one_line(error)}") from error


def _json_line(line: str, labels: str, where: str) -> tuple[Dialogue, int]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: expected JSON, found {one_line(error)}") from error
    names = STRATEGIES[labels]
    label = strategy_id(row.pop("label", None), names, f"{where}, label") if isinstance(row, dict) else None
    if label is None:
        raise InputError(f"{where}: expected an object with turns and a label, found none")
    return read_dialogue(row, names, where), label


def _esconv(path: Path, labels: str) -> Iterator[Sample]:
    data = _english(read_json(path))
    if not isinstance(data, list):
        raise InputError(f"{path}: expected a list of dialogues, found {type(data).__name__}")
    for number, entry in enumerate(data, 1):
        where = f"{path.name}, dialogue {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("dialog"), list):
            raise InputError(f"{where}: expected an object with a list 'dialog'")
        turns = [_esconv_turn(turn, f"{where}, turn {i}") for i, turn in enumerate(entry["dialog"], 1)]
        if not turns:
            raise InputError(f"{where}: expected turns, found an empty dialogue")
        # Turn 1 is <START>, so that the first supporter turn has a history, too.
        whole = read_dialogue({"turns": [{"speaker": "start", "text": START}, *turns]}, STRATEGIES[labels], where)
        for i, turn in enumerate(whole.turns):
            if turn.speaker == "supporter" and turn.strategy is not None:
                yield Sample(dialogue=Dialogue(turns=whole.turns[:i]), label=turn.strategy, group=str(number))


def _esconv_turn(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, dict) or not {"speaker", "content"} <= turn.keys():
        raise InputError(f"{where}: expected an object with speaker and content, found {ascii(turn)[:80]}")
    annotation = turn.get("annotation") or {}
    strategy = annotation.get("strategy", turn.get("strategy")) if isinstance(annotation, dict) else None
    text = turn["content"].strip() if isinstance(turn["content"], str) else turn["content"]
    return {"speaker": turn["speaker"], "text": text, "strategy": strategy}


def _english(value: Any) -> Any:
    """A JSON value with the Telugu keys and speakers in English; texts stay as they are."""
    if isinstance(value, list):
        return [_english(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    result = {TELUGU.get(key, key): _english(each) for key, each in value.items()}
    if isinstance(result.get("speaker"), str):
        result["speaker"] = TELUGU.get(result["speaker"], result["speaker"])
    return result


def _file(folder: Path, stem: str) -> Path | None:
    paths = (folder / f"{stem}{suffix}" for suffix in (".jsonl", ".json"))
    return next((path for path in paths if path.is_file()), None)

"""Emotional-support dialogues: labels, checks, and the tensors of a dialogue's graph. Shared by training and serving.

Labels and the order of their ids are those of EmoDynamiX (Wan et al., NAACL 2025). Shapes: B batch, T turns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from runtimes.errors import InputError
from runtimes.pipeline import TEXT, Schema, array, choice, real, record, whole
from runtimes.tensors import Tensors, require_finite

STRATEGIES: dict[str, tuple[str, ...]] = {
    "esconv": (
        "Reflection of feelings", "Self-disclosure", "Question", "Affirmation and Reassurance",
        "Providing Suggestions", "Restatement or Paraphrasing", "Information", "Others",
    ),
    "annomi": (
        "Reflection-simple", "Reflection-complex", "Question-closed", "Question-open", "Provide information", "Other",
        "Provide suggestion",
    ),
}  # fmt: skip
EMOTIONS = ("Neutral", "Anger", "Disgust", "Fear", "Joy", "Sadness", "Surprise")
DISCOURSE = (
    "Continuation", "Question-answer_pair", "Contrast", "Q-Elab", "Explanation", "Comment", "Background", "Result",
    "Correction", "Parallel", "Alternation", "Conditional", "Clarification_question", "Acknowledgement", "Elaboration",
    "Narration",
)  # fmt: skip
ROOT = len(DISCOURSE)  # the relation of the edge from head 0 to the first turn
RELATIONS = (*DISCOURSE, "root", "self", "inter")
SELF, INTER = RELATIONS.index("self"), RELATIONS.index("inter")
SPEAKERS = ("seeker", "supporter", "start")
PADDING, SEEKER, OTHER = 0, 1, 2  # kinds of turn
TURNS_LIMIT = 1000  # of a request; a model reads its newest turns
TEXT_LIMIT = 20_000  # characters of a turn
LOGIT_LIMIT, PROBABILITY_LIMIT = 1e4, 1 + 1e-3  # of a given emotion
PROBABILITY_FLOOR = 1e-6  # of a given emotion: its logarithm stays finite

DIALOGUE_KEYS = ("turns", "edges", "emotion_logits", "emotion_probs")
TURN_KEYS = ("speaker", "text", "strategy")
Edge = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One turn; `strategy` is the id of the supporter's strategy where it is known."""

    speaker: str
    text: str
    strategy: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Dialogue:
    """Turns, oldest first, and outputs for them that are known already.

    edges           (head, tail, relation) with turns counted from 1 and head 0 for the root; None if not parsed
    emotion_logits  float32 [turns, 7], or None if not classified
    """

    turns: tuple[Turn, ...]
    edges: tuple[Edge, ...] | None = None
    emotion_logits: np.ndarray | None = None

    def newest(self, count: int) -> "Dialogue":
        """The last `count` turns; edges from or to turns that are cut off are cut, too."""
        gone = len(self.turns) - count
        if gone <= 0:
            return self
        edges = self.edges and tuple(
            (head - gone, tail - gone, kind) for head, tail, kind in self.edges if min(head, tail) > gone
        )
        logits = None if self.emotion_logits is None else self.emotion_logits[gone:]
        return replace(self, turns=self.turns[gone:], edges=edges, emotion_logits=logits)

    def with_emotions(self, rows: Sequence[np.ndarray]) -> "Dialogue":
        """The dialogue with logits that a classifier gave, one row for every turn."""
        return replace(self, emotion_logits=np.stack(rows))

    def with_edges(self, rows: np.ndarray) -> "Dialogue":
        """The dialogue with edges [edges, 3] that a parser gave."""
        return replace(self, edges=tuple((head, tail, kind) for head, tail, kind in rows.tolist()))

    @property
    def context(self) -> str:
        """The text that the context encoder reads."""
        return " ".join(f"[{turn.speaker}] {turn.text}" for turn in self.turns)


def read_dialogue(request: Any, strategies: Sequence[str], where: str) -> Dialogue:
    """The dialogue of a JSON object as `EXAMPLE` shows; `InputError` names the fault, and `where` it is."""
    _object(request, DIALOGUE_KEYS, ("turns",), where)
    rows = request["turns"]
    if not isinstance(rows, list) or not 1 <= len(rows) <= TURNS_LIMIT:
        raise _wrong(where, f"a list of 1..{TURNS_LIMIT} turns", rows)
    turns = tuple(_turn(row, strategies, f"{where}, turn {i}") for i, row in enumerate(rows, 1))
    return Dialogue(
        turns=turns,
        edges=_edges(request.get("edges"), len(turns), where),
        emotion_logits=_emotions(request, len(turns), where),
    )


EXAMPLE: dict[str, Any] = {
    "turns": [
        {"speaker": "supporter", "text": "Hello, what would you like to talk about?", "strategy": "Question"},
        {"speaker": "seeker", "text": "I lost my job last week and I cannot sleep."},
    ],
    "edges": [[0, 1, ROOT], [1, 2, DISCOURSE.index("Question-answer_pair")]],
}


def strategy_id(value: Any, strategies: Sequence[str], where: str) -> int | None:
    """The id of a strategy given by id or by name; None stays None."""
    if value is None or (type(value) is int and 0 <= value < len(strategies)):
        return value
    if isinstance(value, str) and value in strategies:
        return strategies.index(value)
    raise _wrong(where, f"a strategy of {', '.join(strategies)}, its id in 0..{len(strategies) - 1}, or null", value)


def graph_tensors(dialogues: Sequence[Dialogue], strategies: int, longest: int = 0) -> Tensors:
    """The inputs of the graph part for dialogues, padded to the longest or to `longest`.

    kinds       int64 [B, T]: 0 padding, 1 seeker, 2 anyone else
    strategies  int64 [B, T]; the number of strategies is none
    relations   int64 [B, T, T]: at [tail, head] the relation of that discourse edge, else -1
    """
    batch, longest = len(dialogues), max(longest, *(len(dialogue.turns) for dialogue in dialogues))
    kinds_BT = np.zeros((batch, longest), np.int64)
    strategies_BT = np.full((batch, longest), strategies, np.int64)
    relations_BTT = np.full((batch, longest, longest), -1, np.int64)
    for row, dialogue in enumerate(dialogues):
        for i, turn in enumerate(dialogue.turns):
            kinds_BT[row, i] = SEEKER if turn.speaker == "seeker" else OTHER
            strategies_BT[row, i] = strategies if turn.strategy is None else turn.strategy
        for head, tail, relation in dialogue.edges or ():
            if head:
                relations_BTT[row, tail - 1, head - 1] = relation
    return {"kinds": kinds_BT, "strategies": strategies_BT, "relations": relations_BTT}


def dialogue_schema(strategies: Sequence[str]) -> Schema:
    """The schema of `read_dialogue`; it does not check that edges join existing turns, or that every turn has a row."""
    strategy = {"anyOf": [choice(strategies), whole(0, len(strategies) - 1)]}
    turn = record({"speaker": choice(SPEAKERS), "text": TEXT | {"maxLength": TEXT_LIMIT}}, {"strategy": strategy})
    edge = array(whole(0, TURNS_LIMIT), 3, 3)
    width = len(EMOTIONS)
    return record(
        {"turns": array(turn, 1, TURNS_LIMIT)},
        {
            "edges": array(edge),
            "emotion_logits": array(array(real(-LOGIT_LIMIT, LOGIT_LIMIT), width, width), 1, TURNS_LIMIT),
            "emotion_probs": array(array(real(0, PROBABILITY_LIMIT), width, width), 1, TURNS_LIMIT),
        },
    )


def emotion_tensors(dialogues: Sequence[Dialogue]) -> Tensors:
    """`emotion_logits` float32 [B, T, 7] of dialogues that have them, and `emotion_known` int64 [B, T]."""
    batch, longest = len(dialogues), max(len(dialogue.turns) for dialogue in dialogues)
    logits_BTE = np.zeros((batch, longest, len(EMOTIONS)), np.float32)
    known_BT = np.zeros((batch, longest), np.int64)
    for row, dialogue in enumerate(dialogues):
        if dialogue.emotion_logits is not None:
            logits_BTE[row, : len(dialogue.turns)] = dialogue.emotion_logits
            known_BT[row, : len(dialogue.turns)] = 1
    return {"emotion_logits": logits_BTE, "emotion_known": known_BT}


def read_answers(outputs: Mapping[str, np.ndarray], strategies: Sequence[str]) -> list[Any]:
    """`{label, probs, emotions, attention}` per row; `EngineError` if an output is not finite.

    The emotions of padding sum to 0, those of turns do not.
    """
    require_finite({name: outputs[name] for name in ("logits", "emotions", "attention")})
    answers = []
    for logits, emotions_TE, attention_LT in zip(
        *(outputs[name] for name in ("logits", "emotions", "attention")), strict=True
    ):
        weights = np.exp(np.float64(logits) - logits.max())
        real = emotions_TE.sum(-1) > 0.5
        answers.append(
            {
                "label": strategies[int(logits.argmax())],
                "probs": dict(zip(strategies, (weights / weights.sum()).tolist(), strict=True)),
                "emotions": [dict(zip(EMOTIONS, map(float, row), strict=True)) for row in emotions_TE[real]],
                "attention": [float(weight) for weight in attention_LT[-1][real]],
            }
        )
    return answers


def _turn(row: Any, strategies: Sequence[str], where: str) -> Turn:
    _object(row, TURN_KEYS, TURN_KEYS[:2], where)
    if not isinstance(row["speaker"], str) or row["speaker"] not in SPEAKERS:
        raise _wrong(f"{where}, speaker", f"one of {', '.join(SPEAKERS)}", row["speaker"])
    text = row["text"]
    if not isinstance(text, str) or len(text) > TEXT_LIMIT:
        raise _wrong(f"{where}, text", f"at most {TEXT_LIMIT} characters", text)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}, text: expected Unicode, found half a surrogate pair at {error.start}") from error
    return Turn(
        speaker=row["speaker"], text=text, strategy=strategy_id(row.get("strategy"), strategies, f"{where}, strategy")
    )


def _edges(rows: Any, turns: int, where: str) -> tuple[Edge, ...] | None:
    if rows is None:
        return None
    if not isinstance(rows, list):
        raise _wrong(f"{where}, edges", "a list of [head, tail, relation]", rows)
    seen = set()
    for row in rows:
        if not isinstance(row, list) or len(row) != 3 or any(type(part) is not int for part in row):
            raise _wrong(f"{where}, edges", "[head, tail, relation] of whole numbers", row)
        head, tail, relation = row
        if not (0 <= head <= turns and 1 <= tail <= turns and head != tail):
            raise _wrong(f"{where}, edges", f"an edge between two of turns 1..{turns} or from root 0", row)
        if relation not in ((ROOT,) if head == 0 else range(ROOT)):
            raise _wrong(f"{where}, edges", f"relation {ROOT} from the root and 0..{ROOT - 1} elsewhere", row)
        if (head, tail) in seen:
            raise _wrong(f"{where}, edges", "one edge from a turn to another", row)
        seen.add((head, tail))
    return tuple((head, tail, relation) for head, tail, relation in rows)


def _emotions(request: Mapping[str, Any], turns: int, where: str) -> np.ndarray | None:
    logits, probs = request.get("emotion_logits"), request.get("emotion_probs")
    name, rows = ("emotion_logits", logits) if logits is not None else ("emotion_probs", probs)
    if rows is None:
        return None
    place = f"{where}, {name}"
    if not isinstance(rows, list) or len(rows) != turns:
        raise _wrong(place, f"{turns} rows, one for every turn", rows)
    for row in rows:
        if not isinstance(row, list) or len(row) != len(EMOTIONS):
            raise _wrong(place, f"{len(EMOTIONS)} numbers for every turn", row)
        low, high = (0, PROBABILITY_LIMIT) if name == "emotion_probs" else (-LOGIT_LIMIT, LOGIT_LIMIT)
        if any(type(value) not in (int, float) or not low <= value <= high for value in row):
            raise _wrong(place, f"numbers in {low:g}..{high:g}", row)
    values = np.array(rows, np.float64)
    return (np.log(values.clip(PROBABILITY_FLOOR)) if name == "emotion_probs" else values).astype(np.float32)


def _object(value: Any, keys: Sequence[str], needed: Sequence[str], where: str) -> None:
    if not isinstance(value, dict):
        raise _wrong(where, f"an object with {', '.join(needed)}", value)
    for key in needed:
        if key not in value:
            raise InputError(f"{where}: expected field '{key}', found none")
    for key in value:
        if key not in keys:
            raise InputError(f"{where}: expected only {', '.join(keys)}; found unknown field {ascii(key)[:60]}")


def _wrong(where: str, expected: str, found: Any) -> InputError:
    if isinstance(found, list) and len(found) > 7:
        shown = f"a list of {len(found)}"
    elif isinstance(found, dict):
        shown = f"an object of {len(found)}"
    elif isinstance(found, str) and len(found) > 60:
        shown = f"{len(found)} characters"
    else:
        shown = ascii(found)
    return InputError(f"{where}: expected {expected}; found {shown if len(shown) <= 160 else shown[:160] + '...'}")

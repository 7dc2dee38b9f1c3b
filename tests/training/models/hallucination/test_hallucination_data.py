"""From text to tokens and back: RAGTruth's files, chunks, spans through offsets, truncation, and what is refused."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes.errors import InputError
from runtimes.pipelines.hallucination.grounding import (
    EXAMPLE,
    GroundedTokens,
    Template,
    chunks,
    covered,
    labelled,
    read_request,
)
from training.models.hallucination.data import read_ragtruth, synthetic_examples, train_and_valid
from training.models.hallucination.frozen import tokenizer_json
from training.models.hallucination.settings import TINY, resolve_config
from training.models.hallucination.spec import draw_inputs

MOST = (8, 16)
TOKENIZER = tokenizer_json("seeded:tiny", "main")
TEMPLATE = Template(before="<s>[INST] ", after=" [/INST] ")
PROMPT = "నమస్తే! The café opened in 1932. Its owner is Zoë."
ANSWER = "It opened in 1932 — 🌉 and Zoë owns it."


def ragtruth(folder: Path, change: Callable[[list[Any], list[Any]], None] = lambda *_: None) -> Path:
    """A small RAGTruth in its two files; `change` spoils them."""
    sources = [
        {"source_id": str(i), "task_type": "QA", "source": "MARCO", "source_info": {}, "prompt": f"{PROMPT} Case {i}."}
        for i in range(6)
    ]
    rows = [
        {
            "id": str(2 * i + k),
            "source_id": str(i),
            "model": model,
            "temperature": 0.7,
            "labels": [{"start": 13, "end": 17, "text": "1932", "label_type": "Evident Conflict"}] if k else [],
            "split": "train" if i < 4 else "test",
            "quality": "good",
            "response": ANSWER,
        }
        for i in range(6)
        for k, model in enumerate(("llama-2-7b-chat", "gpt-4-0613"))
    ]
    change(sources, rows)
    folder.mkdir(exist_ok=True)
    for name, lines in (("source_info.jsonl", sources), ("response.jsonl", rows)):
        (folder / name).write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return folder


def tokens(max_tokens: int = 400, max_rows: int = 100) -> GroundedTokens:
    return GroundedTokens(TOKENIZER, TEMPLATE, max_tokens=max_tokens, max_rows=max_rows)


def text_of(ids: Any) -> str:
    from tokenizers import Tokenizer

    decoded: str = Tokenizer.from_str(TOKENIZER.decode()).decode(list(ids), skip_special_tokens=True)
    return decoded


# RAGTruth ------------------------------------------------------------------------------------------------------------


def test_ragtruth_is_read_with_its_spans_and_its_split(tmp_path: Path) -> None:
    examples = read_ragtruth(ragtruth(tmp_path), "")
    assert len(examples) == 12
    train, valid = train_and_valid(examples, 0.5, 0)
    assert ({e.source for e in train}, {e.source for e in valid}) == ({"0", "1", "2", "3"}, {"4", "5"})
    (faithful, hallucinated) = examples[:2]
    assert (faithful.hallucinated, hallucinated.hallucinated) == ((), ((13, 17),))
    assert len(read_ragtruth(tmp_path, "gpt-4-0613")) == 6


def test_spans_that_redeep_added_are_used(tmp_path: Path) -> None:
    def add(sources: list[Any], rows: list[Any]) -> None:
        sources[0]["prompt_spans"] = [[0, 7], [8, 30]]
        rows[0]["response_spans"] = [[0, 17], [18, 30]]

    example = read_ragtruth(ragtruth(tmp_path, add), "")[0]
    grounded = read_request(example.request, "request", 40, MOST)
    assert (grounded.spans, grounded.prompt_spans) == (((0, 17), (18, 30)), ((0, 7), (8, 30)))


def test_without_a_split_of_their_own_sources_are_held_out_whole() -> None:
    examples = synthetic_examples(0, 40)
    train, valid = train_and_valid([*examples, *examples], 0.25, 1)
    assert len(valid) == 20
    assert not {e.source for e in train} & {e.source for e in valid}
    for example in examples:
        for start, end in example.hallucinated:
            assert example.request["answer"][start:end] not in example.request["prompt"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s, r: r[3].pop("labels"), "response.jsonl, line 4: expected 'labels', found None"),
        (lambda s, r: r[1]["labels"][0].update(end=400), "line 2: expected a label with 0 <= start < end <= .*400"),
        (lambda s, r: r[1]["labels"][0].update(start=20), "line 2: expected a label with 0 <= start < end"),
        (
            lambda s, r: r[1]["labels"][0].update(start=14, end=18),
            "line 2: expected the label at 14 to quote",
        ),
        (lambda s, r: r[1]["labels"][0].pop("end"), "line 2: expected labels with start and end"),
        (lambda s, r: r[5].update(source_id="99"), "line 6: expected source_id of source_info.jsonl, found '99'"),
        (lambda s, r: s[2].pop("prompt"), "source_info.jsonl, line 3: expected 'prompt', found None"),
        (lambda s, r: r.append(7), "line 13: expected an object, found 7"),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(spoil: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_ragtruth(ragtruth(tmp_path, spoil), "")


def test_a_line_that_is_no_utf8_is_refused_with_its_number(tmp_path: Path) -> None:
    path = ragtruth(tmp_path) / "response.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b'{"response": "\xff"}\n', *lines[2:]]))
    with pytest.raises(InputError, match=r"response\.jsonl, line 3: expected JSON in UTF-8"):
        read_ragtruth(tmp_path, "")


def test_a_folder_without_ragtruth_and_an_unknown_generator_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected source_info.jsonl in"):
        read_ragtruth(tmp_path, "")
    with pytest.raises(InputError, match="expected answers of 'llama-9', found those of gpt-4-0613, llama-2-7b-chat"):
        read_ragtruth(ragtruth(tmp_path), "llama-9")


# Spans ---------------------------------------------------------------------------------------------------------------


def test_every_span_of_characters_is_the_span_of_its_tokens() -> None:
    grounded = read_request({"prompt": PROMPT, "answer": ANSWER}, "request", 20, MOST)
    read = tokens().read(grounded, "request")
    assert text_of(read.ids[slice(*read.prompt)]) == PROMPT
    assert text_of(read.ids[slice(*read.answer)]) == ANSWER
    for span, (start, end) in zip(read.spans, grounded.spans, strict=True):
        assert text_of(read.ids[read.answer[0] + span[0] : read.answer[0] + span[1]]) == ANSWER[start:end]
    for span, (start, end) in zip(read.prompt_spans, grounded.prompt_spans, strict=True):
        assert text_of(read.ids[slice(*span)]) == PROMPT[start:end]
    assert read.ids.count(0) == 1, "the template begins the text, and the tokenizer does not begin it again"


@pytest.mark.parametrize("limit", range(95, 160, 7))
def test_truncation_keeps_the_answer_and_keeps_spans_true(limit: int) -> None:
    grounded = read_request({"prompt": PROMPT * 4, "answer": ANSWER}, "request", 20, (8, 64))
    read = tokens(limit).read(grounded, "request")
    assert limit - 8 < len(read.ids) <= limit
    assert text_of(read.ids[slice(*read.answer)]) == ANSWER
    kept = read.text.prompt
    assert (PROMPT * 4).startswith(kept)
    for span, (start, end) in zip(read.prompt_spans, read.text.prompt_spans, strict=True):
        assert 0 <= start < end <= len(kept)
        assert text_of(read.ids[slice(*span)]) == kept[start:end]


@pytest.mark.parametrize("characters", [5, 12, 30, 100])
def test_chunks_cover_all_words_once_and_no_region_is_crossed(characters: int) -> None:
    text = "One. Two is here!  Three\nfour five six seven eight nine ten eleven. " * 3
    regions = ((0, 60), (60, len(text)))
    found = chunks(text, regions, characters, 1000)
    assert all(a[1] <= b[0] for a, b in pairwise(found))
    assert "".join(text[s:e] for s, e in found).replace(" ", "").replace("\n", "") == "".join(text.split())
    assert not any(start < 60 < end for start, end in found)
    assert len(chunks(text, regions, characters, 4)) <= 4


def test_a_label_touches_every_chunk_it_shares_a_character_with() -> None:
    assert labelled(((0, 10), (10, 20), (21, 30)), ((9, 11), (29, 40))) == [1, 1, 1]
    assert labelled(((0, 10), (10, 20)), ((20, 22),)) == [0, 0]
    assert covered(np.array([[0, 2], [2, 2], [2, 5]]), (1, 2)) == (0, 1)


def test_contexts_are_regions_of_the_prompt_and_the_question_is_not_searched() -> None:
    grounded = read_request(EXAMPLE, "request", 30, MOST)
    joined = " ".join(grounded.prompt[s:e] for s, e in grounded.prompt_spans)
    assert joined == EXAMPLE["contexts"][0]
    assert grounded.prompt.endswith(EXAMPLE["question"])


def test_space_after_the_last_context_belongs_to_no_chunk() -> None:
    grounded = read_request({"contexts": ["It is red. ", "It is long. \n"], "answer": "b"}, "request", 30, MOST)
    assert [grounded.prompt[s:e] for s, e in grounded.prompt_spans] == ["It is red.", "It is long."]


# What is refused -----------------------------------------------------------------------------------------------------

WRONG = {
    "no object": ([], "expected an object with 'contexts' or 'prompt' and 'answer'"),
    "no answer": ({"prompt": "a"}, "expected an object with"),
    "unknown name": ({"prompt": "a", "answer": "b", "label": 1}, "expected an object with"),
    "two prompts": ({"prompt": "a", "contexts": ["b"], "answer": "c"}, "expected either 'prompt' or 'contexts'"),
    "no prompt": ({"answer": "c"}, "expected either 'prompt' or 'contexts'"),
    "empty context": ({"contexts": ["a", "  "], "answer": "b"}, "context 1: expected a text, found an empty one"),
    "no contexts": ({"contexts": [], "answer": "b"}, "contexts: expected a list of texts, found \\[\\]"),
    "empty answer": ({"prompt": "a", "answer": ""}, "answer: expected a text, found an empty one"),
    "number": ({"prompt": "a", "answer": 7}, "answer: expected a text, found 7"),
    "surrogate": ({"prompt": "a", "answer": "b\ud800"}, "half of a surrogate pair"),
    "span beyond": ({"prompt": "a", "answer": "bc", "spans": [[0, 3]]}, "spans: expected 0 <= start < end <= 2"),
    "span backward": ({"prompt": "a", "answer": "bc", "spans": [[1, 1]]}, "spans: expected 0 <= start < end"),
    "span negative": ({"prompt": "ab", "answer": "bc", "prompt_spans": [[-1, 1]]}, "prompt_spans: expected 0 <= start"),
    "span of text": ({"prompt": "a", "answer": "bc", "spans": [["0", 1]]}, "spans: expected 0 <= start"),
    "no spans": ({"prompt": "a", "answer": "bc", "spans": []}, "spans: expected a list"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_is_refused(name: str) -> None:
    request, message = WRONG[name]
    with pytest.raises(InputError, match=f"request 3.*{message}") as caught:
        read_request(request, "request 3", 40, MOST)
    assert "\n" not in str(caught.value)


def test_an_answer_that_fills_the_window_is_refused() -> None:
    grounded = read_request({"prompt": PROMPT, "answer": ANSWER}, "request 0", 40, MOST)
    with pytest.raises(InputError, match="request 0: expected an answer inside the context window of 60 tokens"):
        tokens(60).read(grounded, "request 0")
    with pytest.raises(InputError, match="expected an answer of at most 5 tokens, found 4"):
        tokens(max_rows=5).read(grounded, "request 0")


def test_inputs_are_cut_from_what_is_no_padding() -> None:
    config, sizes = resolve_config(TINY), {"batch": 3, "tokens": 40, "rows": 8, "chunks": 2, "prompt_chunks": 2}
    sizes |= {"chunk_tokens": 4, "prompt_chunk_tokens": 4}
    short = np.zeros((2, 500), np.int64)
    short[:, :12] = np.arange(10, 22)
    sample_inputs = {"token_ids": short, "chunk_ids": short[:, None, :4], "prompt_chunk_ids": short[:, None, :4]}
    for seed in range(5):
        made = draw_inputs(config, np.random.default_rng(seed), sizes, sample_inputs)
        assert made["token_ids"].shape == (3, 40)
        assert (made["token_ids"] >= 10).all(), "a text of padding has no choice of a head that is not a tie"

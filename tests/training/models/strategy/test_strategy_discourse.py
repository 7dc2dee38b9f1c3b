"""The discourse parser: its scores, its trees, public weights, and the same edges in training and in serving."""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import RobertaConfig, RobertaModel

from export import all as export_all
from runtimes.cache.store import Store
from runtimes.errors import InputError, MissingPackage
from runtimes.pipeline import Pipeline, open_pipeline
from runtimes.pipelines.strategy.cached import StrategyCascade
from runtimes.pipelines.strategy.dialogue import DISCOURSE, ROOT, STRATEGIES, read_dialogue
from runtimes.pipelines.strategy.discourse import (
    NO_HEAD,
    NO_PAIR,
    best_trees,
    pair_tensors,
    pair_tokens,
    parser_dialogue,
    parser_text,
)
from runtimes.repository import find
from runtimes.runtime import open_runtime
from runtimes.triton.server import TritonServer, find_bundle
from training.checkpoint import Checkpoint
from training.models.strategy.discourse import DiscourseParser, load_parser, trees
from training.models.strategy.frozen import load_encoder, tokenizer_json
from training.models.strategy.recipe import StrategyRecipe
from training.run import main as run

CLASSES = len(DISCOURSE) + 1
TURNS = [
    {"speaker": "seeker", "text": "Hello"},
    {"speaker": "supporter", "text": "What happened?"},
    {"speaker": "seeker", "text": "నా ఉద్యోగం పోయింది."},
]


def dialogue_of(turns: int, **more: Any) -> Any:
    return read_dialogue({"turns": TURNS[:turns], **more}, STRATEGIES["esconv"], "here")


def made_up_scores(turns: int, width: int, seed: int) -> np.ndarray:
    """Scores [width, width, C] of a dialogue of `turns` turns, as the parser gives them."""
    scores = np.random.default_rng(seed).normal(size=(width, width, CLASSES)).astype(np.float32)
    scores[~(np.triu(np.ones((width, width), bool)) & (np.arange(width) < turns))] = NO_PAIR
    return scores


def every_tree(turns: int) -> Iterator[tuple[int, ...]]:
    """The head of each turn, 0 for the root, in every tree whose root has one child and whose heads come first."""
    for heads in itertools.product(range(turns + 1), repeat=turns):
        if heads.count(0) == 1 and all(head < tail for tail, head in enumerate(heads, 1)):
            yield heads


@pytest.mark.parametrize("turns", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_the_best_tree_is_the_best_of_all_trees(turns: int, seed: int) -> None:
    scores = made_up_scores(turns, 5, seed)
    (edges,) = best_trees(scores[None])

    def total(heads: Sequence[int]) -> float:
        return sum(scores[head - 1, tail, :ROOT].max() for tail, head in enumerate(heads) if head)

    assert edges[:, 1].tolist() == list(range(1, turns + 1))
    assert edges[0].tolist() == [0, 1, ROOT]
    assert tuple(edges[:, 0]) in every_tree(turns)
    assert total(edges[:, 0]) == pytest.approx(max(map(total, every_tree(turns))))
    for head, tail, relation in edges[1:]:
        assert relation == scores[head - 1, tail - 1, :ROOT].argmax()


def test_the_tree_inside_the_fused_model_is_the_one_outside() -> None:
    scores = np.stack([made_up_scores(turns, 6, turns) for turns in (1, 2, 4, 6)])
    found = trees(torch.from_numpy(scores)).numpy()
    for edges, relations in zip(best_trees(scores), found, strict=True):
        want = np.full((6, 6), -1)
        for head, tail, relation in edges[1:]:
            want[tail - 1, head - 1] = relation
        np.testing.assert_array_equal(relations, want)


def test_every_turn_is_read_after_each_earlier_one_and_after_nothing() -> None:
    tokens = pair_tokens(tokenizer_json("seeded:tiny", "main"))
    tensors = pair_tensors([dialogue_of(2), dialogue_of(1)], tokens)
    first, second = "seeker , Hello", "supporter , What happened?"
    want = tokens.ids([(NO_HEAD, first), (first, second), (NO_HEAD, second)])
    np.testing.assert_array_equal(tensors["pair_ids"][0], want)
    assert tensors["pair_places"].tolist() == [[[0, 1], [-1, 2]], [[0, -1], [-1, -1]]]


def test_a_dialogue_with_edges_is_not_read() -> None:
    tensors = pair_tensors([dialogue_of(3, edges=[])], pair_tokens(tokenizer_json("seeded:tiny", "main")))
    assert tensors["pair_ids"].shape[:2] == (1, 1)
    assert (tensors["pair_places"] == -1).all()


def test_a_dialogue_survives_its_name_in_a_store() -> None:
    assert parser_dialogue(parser_text(dialogue_of(3))) == dialogue_of(3)


def test_a_dialogue_is_parsed_alike_beside_a_longer_one() -> None:
    parser, tokens = load_parser("seeded:tiny"), pair_tokens(tokenizer_json("seeded:tiny", "main"))
    dialogues = [dialogue_of(1), dialogue_of(3), dialogue_of(2)]
    together = parser(*(torch.from_numpy(array) for array in pair_tensors(dialogues, tokens).values()))
    for row, dialogue in zip(together, dialogues, strict=True):
        alone = parser(*(torch.from_numpy(array) for array in pair_tensors([dialogue], tokens).values()))[0]
        turns = len(dialogue.turns)
        torch.testing.assert_close(row[:turns, :turns], alone)
        assert (row[turns:] == NO_PAIR).all()
        assert (row[:, turns:] == NO_PAIR).all()


def test_the_pair_scores_are_those_of_four_passes_written_as_loops() -> None:
    torch.manual_seed(0)
    parser = DiscourseParser(load_encoder("seeded:tiny", "main"))
    turns = 4
    pairs = torch.triu(torch.ones(turns, turns)).unsqueeze(-1) * torch.randn(turns, turns, 64)

    def last(lstm: nn.LSTM, path: list[tuple[int, int]]) -> torch.Tensor:
        return lstm(torch.stack([pairs[place] for place in path])[None])[0][0, -1]

    wide = torch.nn.functional.pad(pairs, (0, 0, 0, 2, 0, 2))  # as beside a dialogue of six turns
    found = parser.score(wide[None], torch.tensor([turns]))[0]
    for i in range(turns):
        for j in range(i, turns):
            right = last(parser.from_diagonal, [(i, k) for k in range(i, j + 1)])
            left = last(parser.to_diagonal, [(i, k) for k in range(turns - 1, j - 1, -1)])
            down = last(parser.to_diagonal, [(k, j) for k in range(i + 1)])
            up = last(parser.from_diagonal, [(k, j) for k in range(j, i - 1, -1)])
            want = parser.classes(torch.cat([right + down, left + up]))
            torch.testing.assert_close(found[i, j], want)


class PublicLayout(nn.Module):
    """The modules of the public parser under their public names."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.encoder = RobertaModel(config)
        self.struct_attention = nn.Module()
        for name in ("rnn_f", "rnn_b"):
            lstm = nn.LSTM(config.hidden_size, config.hidden_size, bidirectional=True, batch_first=True)
            setattr(self.struct_attention, name, lstm)
        self.struct_attention.transform_list = nn.ModuleList([nn.Linear(2 * config.hidden_size, CLASSES)])

    def scores(self, pairs: torch.Tensor) -> torch.Tensor:
        """Scores [T, T, C] from vectors [T, T, D]: of a bidirectional LSTM along each path the backward half counts."""
        turns, _, width = pairs.shape
        result = torch.full((turns, turns, CLASSES), NO_PAIR)

        def backward(lstm: nn.LSTM, path: list[tuple[int, int]], at: tuple[int, int]) -> torch.Tensor:
            printed = lstm(torch.stack([pairs[place] for place in path])[None])[0][0, path.index(at)]
            return printed[width:]

        rnn_f, rnn_b = self.struct_attention.rnn_f, self.struct_attention.rnn_b
        for i in range(turns):
            for j in range(i, turns):
                row, column = [(i, k) for k in range(turns)], [(k, j) for k in range(turns)]
                across = backward(rnn_b, row[i:][::-1], (i, j)), backward(rnn_f, row, (i, j))
                down = backward(rnn_f, column[::-1], (i, j)), backward(rnn_b, column[: j + 1], (i, j))
                vector = torch.cat(across) + torch.cat(down)
                result[i, j] = self.struct_attention.transform_list[0](vector)
        return result


@pytest.fixture
def public_parser(tmp_path: Path) -> tuple[Path, PublicLayout]:
    """A small parser with random weights in a folder as the public one would be, converted to safetensors."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=260, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    module = PublicLayout(config).eval()
    config.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json("seeded:tiny", "main"))
    positions = {"encoder.embeddings.position_ids": torch.arange(512)[None]}  # of older versions of transformers
    save_file({**module.state_dict(), **positions}, tmp_path / "model.safetensors")
    return tmp_path, module


def test_public_weights_have_the_outputs_of_their_own_layout(public_parser: tuple[Path, PublicLayout]) -> None:
    folder, public = public_parser
    tokens = pair_tokens((folder / "tokenizer.json").read_bytes())
    tensors = [torch.from_numpy(array) for array in pair_tensors([dialogue_of(3)], tokens).values()]
    with torch.inference_mode():
        found = load_parser(str(folder))(*tensors)[0]
        padding = public.encoder.config.pad_token_id
        vectors = public.encoder(tensors[0][0], (tensors[0][0] != padding).long())[0][:, 0]
        pairs = torch.zeros(3, 3, 16)
        for i, j in zip(*np.triu_indices(3), strict=True):
            pairs[i, j] = vectors[tensors[1][0, i, j]]
        torch.testing.assert_close(found, public.scores(pairs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"struct_attention.rnn_f.weight_ih_l0_reverse": None}, "to_diagonal.weight_ih_l0"),
        ({"encoder.encoder.layer.0.output.dense.bias": None}, "encoder.encoder.layer.0.output.dense.bias"),
        ({"struct_attention.extra": torch.zeros(1)}, "struct_attention.extra"),
        ({"struct_attention.transform_list.0.weight": torch.zeros(1, 32)}, "classes.weight"),
    ],
)
def test_weights_with_an_unknown_or_missing_name_are_refused(
    change: dict[str, Any], named: str, public_parser: tuple[Path, PublicLayout]
) -> None:
    folder, public = public_parser
    changed = {name: tensor for name, tensor in {**public.state_dict(), **change}.items() if tensor is not None}
    save_file(changed, folder / "model.safetensors")
    with pytest.raises(InputError, match=named) as caught:
        load_parser(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"not safetensors"])
def test_a_folder_without_readable_weights_is_refused(
    content: bytes | None, public_parser: tuple[Path, PublicLayout]
) -> None:
    path = public_parser[0] / "model.safetensors"
    path.unlink()
    if content:
        path.write_bytes(content)
    with pytest.raises(InputError, match="safetensors"):
        load_parser(str(public_parser[0]))


PARTS = ("strategy", "strategy_encoder", "strategy_emotion", "strategy_parser", "strategy_graph")


def unparsed(path: Path, count: int) -> list[dict[str, Any]]:
    """The first dialogues of a file without their edges."""
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(next(lines)) for _ in range(count)]
    return [{name: value for name, value in row.items() if name != "edges"} for row in rows]


@pytest.fixture(scope="module")
def parsing(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(data, checkpoint, repository) of a model trained with a parser on real dialogues without edges."""
    folder = tmp_path_factory.mktemp("parsing")
    path = folder / "unparsed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in unparsed(data / "dialogue" / "esconv_valid.jsonl", 60)))
    arguments = ["--data", str(path), "--out", str(folder), "--parser", "sddp", "--history", "5", "--epochs", "1"]
    assert run(["strategy", *arguments]) == 0
    models = [argument for part in PARTS for argument in ("--model", part)]
    places = ["--checkpoints", str(folder), "--repository", str(folder / "repository")]
    assert export_all.main(["--target", "onnx", *models, *places]) == 0
    return path, folder / "strategy", folder / "repository"


def pipeline_of(part: str, repository: Path) -> Pipeline:
    root = find(repository, f"{part}_onnx")
    with open_runtime(root) as runtime:
        return open_pipeline(runtime.artifact, root)


@pytest.mark.slow
def test_served_edges_are_those_of_training(parsing: tuple[Path, Path, Path]) -> None:
    path, folder, repository = parsing
    checkpoint = Checkpoint.load(folder)
    recipe = StrategyRecipe(checkpoint.config, checkpoint.training, path)
    samples, table = recipe.samples[0], recipe.tables[0]
    requests = [{"turns": [{"speaker": turn.speaker, "text": turn.text} for turn in s.dialogue.turns]} for s in samples]
    with Store() as store, StrategyCascade(repository, store) as cascade:
        assert cascade.discourse is not None
        for request, relations in zip(requests, table["relations"].numpy(), strict=True):
            served = cascade.inputs([request])["relations"][0]
            turns = len(request["turns"])
            np.testing.assert_array_equal(served, relations[:turns, :turns])
    assert (table["relations"] >= 0).sum() > len(samples)


@pytest.mark.slow
def test_the_fused_model_parses_dialogues_without_edges_and_uses_given_edges(
    parsing: tuple[Path, Path, Path],
) -> None:
    path, _, repository = parsing
    requests = [{name: row[name] for name in ("turns",)} for row in unparsed(path, 6)]
    requests.append({**requests[5], "edges": []})
    root = find(repository, "strategy_onnx")
    with open_runtime(root) as runtime:
        pipeline = open_pipeline(runtime.artifact, root)
        fused = pipeline.decode(runtime.fresh(pipeline.encode(requests)))
    with Store() as store, StrategyCascade(repository, store) as cascade:
        parts = cascade.answer(requests)
    for one, other in zip(fused, parts, strict=True):
        np.testing.assert_allclose(list(one["probs"].values()), list(other["probs"].values()), atol=1e-5)
    assert not np.allclose(list(fused[5]["probs"].values()), list(fused[6]["probs"].values()), atol=1e-4)


@pytest.mark.slow
def test_the_parts_agree_with_and_without_edges(parsing: tuple[Path, Path, Path]) -> None:
    parser, graph = (pipeline_of(part, parsing[2]) for part in ("strategy_parser", "strategy_graph"))
    without = {name: value for name, value in graph.example().items() if name != "edges"}
    with pytest.raises(InputError, match="run strategy_parser"):
        graph.encode([without])
    with pytest.raises(InputError, match="without edges"):
        parser.encode([{"turns": TURNS, "edges": [[0, 1, ROOT]]}])
    root = find(parsing[2], "strategy_parser_onnx")
    with open_runtime(root) as runtime:
        answers = parser.decode(runtime.run(parser.encode([{"turns": TURNS}, {"turns": TURNS[:1]}])))
    assert [len(answer["edges"]) for answer in answers] == [3, 1]


@pytest.mark.slow
def test_the_ensemble_parses_dialogues_without_edges(parsing: tuple[Path, Path, Path]) -> None:
    http = pytest.importorskip("tritonclient.http")
    try:
        find_bundle()
    except MissingPackage as error:
        pytest.skip(str(error))
    request = {"turns": [{"speaker": "start", "text": "<START>"}, *TURNS]}
    with Store() as store, StrategyCascade(parsing[2], store) as cascade:
        (want,) = cascade.answer([request])
    tensor = http.InferInput("request", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[json.dumps(request).encode()]], np.object_))
    with TritonServer(parsing[2]) as server, http.InferenceServerClient(server.http_url) as client:
        got = json.loads(client.infer("strategy", [tensor]).as_numpy("answer").item())
    np.testing.assert_allclose(list(got["probs"].values()), list(want["probs"].values()), atol=1e-5)


@pytest.mark.slow
def test_a_model_trained_without_a_parser_has_no_parser_to_export(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--target", "onnx", "--model", "strategy_parser", "--checkpoints", str(checkpoints), "--json"]
    assert export_all.main([*arguments, "--repository", str(tmp_path)]) == 1, "a named model was not exported"
    (cell,) = json.loads(capsys.readouterr().out)["cells"]
    assert (cell["status"], "--parser sddp" in cell["reason"]) == ("skipped", True)

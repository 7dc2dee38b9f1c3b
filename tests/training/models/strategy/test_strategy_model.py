"""The model against independent references: PyG's RGATConv, a loop over edges."""

from typing import Any

import numpy as np
import pytest
import torch
from torch_geometric.nn import RGATConv

from runtimes.errors import InputError
from runtimes.pipelines.strategy.dialogue import INTER, OTHER, RELATIONS, SEEKER, SELF
from training.models.strategy.discourse import one_hot
from training.models.strategy.module import StrategyGraph, typed_edges
from training.models.strategy.rgat import RelationalAttention
from training.models.strategy.sparse import GroupedRGATConv, SparseLayers
from training.settings import override
from training.spec import find_spec

SPEC = find_spec("strategy_graph")
TINY = SPEC.preset("tiny")


def graph_of(**changes: Any) -> StrategyGraph:
    torch.manual_seed(0)
    module = StrategyGraph({**TINY, **changes}).eval()
    for parameter in module.parameters():
        parameter.data += torch.randn_like(parameter) * 0.02  # biases, too, are not zero
    return module


def inputs_of(batch: int = 5, turns: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    sizes = {"batch": batch, "turns": turns}
    arrays = SPEC.parity.draw_inputs(TINY, np.random.default_rng(seed), sizes, {})
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def loop_over_edges(layer: RelationalAttention, nodes: torch.Tensor, typed: torch.Tensor) -> torch.Tensor:
    """The formula of the specification, node by node."""
    result = layer.bias.expand_as(nodes).clone()
    for i in range(len(nodes)):
        edges = [(j, int(typed[i, j])) for j in range(len(nodes)) if typed[i, j] >= 0]
        if not edges:
            continue
        scores = [
            torch.nn.functional.leaky_relu(
                nodes[i] @ layer.weight[r] @ layer.query + nodes[j] @ layer.weight[r] @ layer.key, 0.2
            )
            for j, r in edges
        ]
        shares = torch.softmax(torch.cat(scores), 0)
        result[i] += sum(share * (nodes[j] @ layer.weight[r]) for share, (j, r) in zip(shares, edges, strict=True))
    return result


def test_a_layer_on_three_nodes_and_two_relations_is_the_formula() -> None:
    torch.manual_seed(0)
    layer = RelationalAttention(4, 2)
    layer.bias.data.normal_()
    nodes = torch.randn(3, 4)
    typed = torch.tensor([[-1, 0, 1], [-1, -1, 0], [-1, -1, -1]])
    edges = (typed[None, None] == torch.arange(2).view(1, 2, 1, 1)).float()
    found, attention = layer(nodes[None], nodes[None], edges)
    torch.testing.assert_close(found[0], loop_over_edges(layer, nodes, typed))
    torch.testing.assert_close(attention[0].sum(-1), torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(found[0, 2], layer.bias.data)


def untouched_pyg(layers: Any, nodes: torch.Tensor, typed: torch.Tensor) -> torch.Tensor:
    """Nodes [B, N, W] after all layers by RGATConv itself, dialogue by dialogue."""
    rows = []
    for x, relations in zip(nodes, typed, strict=True):
        tails, heads = (relations >= 0).nonzero(as_tuple=True)
        for layer in layers:
            conv = RGATConv(x.shape[1], x.shape[1], len(RELATIONS))
            own = {"weight": layer.weight, "q": layer.query, "k": layer.key, "bias": layer.bias}
            conv.load_state_dict({**conv.state_dict(), **own})
            x = conv(x, torch.stack([heads, tails]), relations[tails, heads]) + x
        rows.append(x)
    return torch.stack(rows)


@pytest.mark.parametrize(("width", "turns"), [(64, 1), (64, 6), (64, 16), (512, 5)])
def test_both_forms_of_the_layers_are_pygs(width: int, turns: int) -> None:
    graph, inputs = graph_of(hg_dim=width), inputs_of(turns=turns)
    nodes = graph.nodes(inputs["emotion_logits"], inputs["kinds"], inputs["strategies"])
    typed = typed_edges(inputs["kinds"], inputs["relations"])
    want = untouched_pyg(graph.layers, nodes, typed)
    assert (SparseLayers(list(graph.layers))(nodes, typed) - want).abs().max() < 1e-5
    edges = one_hot(typed, len(RELATIONS)).permute(0, 3, 1, 2)
    dense = nodes
    for layer in graph.layers:
        dense = layer(dense, dense, edges)[0] + dense
    assert (dense - want).abs().max() < 1e-5
    logits = graph(*inputs.values())[0]
    assert (logits - graph.classify(want[:, 0], inputs["context"])).abs().max() < 1e-5


def test_a_layer_gives_mixtures_what_it_gives_the_nodes_mixed() -> None:
    graph, inputs = graph_of(), inputs_of()
    shares = graph.shares(inputs["emotion_logits"], inputs["kinds"], inputs["strategies"])
    edges = one_hot(typed_edges(inputs["kinds"], inputs["relations"]), len(RELATIONS)).permute(0, 3, 1, 2)
    mixed = graph.layers[0](shares, shares, edges, basis_KW=graph.basis())
    nodes = shares @ graph.basis()
    torch.testing.assert_close(mixed, graph.layers[0](nodes, nodes, edges))


def random_edges(nodes: int, edges: int, kinds: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randint(nodes, (2, edges), generator=generator),
        torch.randint(kinds, (edges,), generator=generator),
    )


@pytest.mark.parametrize(("edges", "kinds"), [(40, 19), (40, 2), (0, 1)])
def test_grouping_edges_changes_neither_what_rgatconv_says_nor_how_it_learns(edges: int, kinds: int) -> None:
    torch.manual_seed(0)
    layers = RGATConv(32, 32, 19), GroupedRGATConv(32, 32, 19)
    layers[1].load_state_dict(layers[0].state_dict())
    where, relations = random_edges(12, edges, kinds)
    nodes = torch.randn(12, 32)
    inputs = [nodes.clone().requires_grad_() for _ in layers]
    outputs = [layer(x, where, relations) for layer, x in zip(layers, inputs, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0])
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    want = {name: p.grad for name, p in layers[0].named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in layers[1].named_parameters() if p.grad is not None}
    assert found.keys() == want.keys()
    assert "weight" in want
    for name, gradient in want.items():
        torch.testing.assert_close(found[name], gradient)


def test_the_sparse_layers_train_the_parameters_of_the_dense_ones() -> None:
    graph, inputs = graph_of(), inputs_of()
    typed = typed_edges(inputs["kinds"], inputs["relations"])
    nodes = graph.nodes(inputs["emotion_logits"], inputs["kinds"], inputs["strategies"])
    sparse = SparseLayers(list(graph.layers))
    sparse(nodes, typed).square().sum().backward()
    assert all(layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0 for layer in graph.layers)
    trained = {id(parameter) for parameter in sparse.parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for parameter in graph.layers.parameters()}


def test_three_layers_of_width_512_have_the_published_number_of_parameters() -> None:
    layers = [RelationalAttention(512, len(RELATIONS)) for _ in range(3)]
    assert sum(parameter.numel() for layer in layers for parameter in layer.parameters()) == 14_946_816


def test_turns_that_are_padding_have_no_influence() -> None:
    graph, inputs = graph_of(), inputs_of(batch=3, turns=4)
    want = graph(*inputs.values())
    wide = {
        "context": inputs["context"],
        "emotion_logits": torch.nn.functional.pad(inputs["emotion_logits"], (0, 0, 0, 5), value=9.0),
        "kinds": torch.nn.functional.pad(inputs["kinds"], (0, 5)),
        "strategies": torch.nn.functional.pad(inputs["strategies"], (0, 5), value=3),
        "relations": torch.nn.functional.pad(inputs["relations"], (0, 5, 0, 5), value=-1),
    }
    got = graph(*wide.values())
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1][:, :4], want[1])
    torch.testing.assert_close(got[2][..., :4], want[2])
    assert got[1][:, 4:].abs().max() == 0
    assert got[2][..., 4:].abs().max() == 0


def test_the_order_of_a_batch_does_not_matter_and_duplicates_are_equal() -> None:
    graph, inputs = graph_of(), inputs_of(batch=6)
    order = torch.tensor([3, 0, 5, 5, 1, 3])
    want = graph(*inputs.values())[0][order]
    got = graph(*(tensor[order] for tensor in inputs.values()))[0]
    torch.testing.assert_close(got, want)
    assert torch.equal(got[2], got[3])
    assert torch.equal(got[0], got[5])


def test_the_attention_of_the_dummy_is_a_distribution_over_turns() -> None:
    graph, inputs = graph_of(), inputs_of()
    _, emotions, attention = graph(*inputs.values())
    torch.testing.assert_close(attention.sum(-1), torch.ones(5, 3))
    torch.testing.assert_close(emotions.sum(-1), (inputs["kinds"] > 0).float())


def test_a_discourse_edge_is_the_only_one_that_enters_its_turn_so_its_attention_is_one() -> None:
    graph, inputs = graph_of(), inputs_of()
    typed = typed_edges(inputs["kinds"], inputs["relations"])
    edges = one_hot(typed, len(RELATIONS)).permute(0, 3, 1, 2)
    nodes = graph.nodes(inputs["emotion_logits"], inputs["kinds"], inputs["strategies"])
    _, attention = graph.layers[0](nodes, nodes, edges)
    discourse = typed[:, 1:] >= 0
    torch.testing.assert_close(attention[:, 1:][discourse], torch.ones(int(discourse.sum())))


def test_every_turn_tells_the_dummy_who_speaks() -> None:
    kinds = torch.tensor([[SEEKER, OTHER, 0]])
    typed = typed_edges(kinds, torch.full((1, 3, 3), -1))
    assert typed[0, 0].tolist() == [-1, INTER, SELF, -1]
    assert (typed[0, 1:] == -1).all()


def test_hard_emotions_are_one_prototype_and_mixed_ones_become_it_when_cold() -> None:
    logits = torch.randn(2, 3, 7)
    hard, cold = graph_of(emotion="hard"), graph_of(temperature=1e-6)
    torch.testing.assert_close(hard.mixture(logits), cold.mixture(logits))
    warm = graph_of().mixture(logits)
    torch.testing.assert_close(warm.sum(-1), torch.ones(2, 3))
    assert warm.max() < 1


def test_the_temperature_starts_where_it_is_set() -> None:
    graph = StrategyGraph({**TINY, "temperature": 0.25})
    logits = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0.5]])
    torch.testing.assert_close(graph.mixture(logits), torch.softmax(logits * 4, -1))


@pytest.mark.parametrize(
    "change",
    [
        {"emotion": "soft"},
        {"parser": "rst"},
        {"labels": "daily"},
        {"hg_dim": "0"},
        {"temperature": "0"},
        {"pooling": "x"},
    ],
)
def test_an_impossible_setting_is_refused_before_anything_is_built(change: dict[str, str]) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        SPEC.interface.signature(override(TINY, change))

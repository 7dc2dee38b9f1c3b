"""The tensors of the strategy models."""

from runtimes.errors import InputError
from runtimes.pipelines.strategy.dialogue import DISCOURSE, EMOTIONS, STRATEGIES
from runtimes.pipelines.strategy.discourse import PAIR_TOKENS
from runtimes.tensors import Axis, Signature, TensorSpec
from training.config import Config
from training.models.strategy.settings import BATCH_MAX, CHOICES, LAYERS


def _batch() -> Axis:
    return Axis(name="batch", min=1, opt=4, max=BATCH_MAX)


def _graph_inputs() -> tuple[TensorSpec, ...]:
    return (
        TensorSpec(name="kinds", dtype="int64", shape=("batch", "turns")),
        TensorSpec(name="strategies", dtype="int64", shape=("batch", "turns")),
        TensorSpec(name="relations", dtype="int64", shape=("batch", "turns", "turns")),
    )


def _emotion_logits() -> TensorSpec:
    return TensorSpec(name="emotion_logits", dtype="float32", shape=("batch", "turns", len(EMOTIONS)))


def _parser_inputs() -> tuple[TensorSpec, ...]:
    return (
        TensorSpec(name="pair_ids", dtype="int64", shape=("batch", "pairs", "pair_tokens")),
        TensorSpec(name="pair_places", dtype="int64", shape=("batch", "turns", "turns")),
    )


def _parser_axes(config: Config) -> tuple[Axis, ...]:
    turns = _turns(config)
    pairs = Axis(name="pairs", min=1, opt=_pairs(turns.opt), max=_pairs(turns.max))
    return pairs, _tokens("pair_tokens", PAIR_TOKENS)


def _pairs(turns: int) -> int:
    return turns * (turns + 1) // 2


def _turns(config: Config) -> Axis:
    return Axis(name="turns", min=1, opt=min(5, config["max_turns"]), max=config["max_turns"])


def _answers(config: Config) -> tuple[TensorSpec, ...]:
    return (
        TensorSpec(name="logits", dtype="float32", shape=("batch", len(STRATEGIES[config["labels"]]))),
        TensorSpec(name="emotions", dtype="float32", shape=("batch", "turns", len(EMOTIONS))),
        TensorSpec(name="attention", dtype="float32", shape=("batch", LAYERS, "turns")),
    )


def fused_signature(config: Config) -> Signature:
    """Token ids and the graph in; logits, emotions by turn and attention over turns out."""
    check(config)
    parsing = config["parser"] == "sddp"
    unparsed = (*_parser_inputs(), TensorSpec(name="edges_known", dtype="int64", shape=("batch",)))
    tokens = _tokens("tokens", config["max_tokens"]), _tokens("turn_tokens", config["turn_tokens"])
    return Signature(
        inputs=(
            TensorSpec(name="context_ids", dtype="int64", shape=("batch", "tokens")),
            TensorSpec(name="turn_ids", dtype="int64", shape=("batch", "turns", "turn_tokens")),
            _emotion_logits(),
            TensorSpec(name="emotion_known", dtype="int64", shape=("batch", "turns")),
            *_graph_inputs(),
            *(unparsed if parsing else ()),
        ),
        outputs=_answers(config),
        axes=(_batch(), _turns(config), *tokens, *(_parser_axes(config) if parsing else ())),
    )


def graph_signature(config: Config) -> Signature:
    check(config)
    context = TensorSpec(name="context", dtype="float32", shape=("batch", config["context_width"]))
    return Signature(
        inputs=(context, _emotion_logits(), *_graph_inputs()), outputs=_answers(config), axes=(_batch(), _turns(config))
    )


def parser_signature(config: Config) -> Signature:
    """Pairs of turns in, scores at [head, tail, relation] out."""
    check(config)
    scores = TensorSpec(name="pair_scores", dtype="float32", shape=("batch", "turns", "turns", len(DISCOURSE) + 1))
    return Signature(inputs=_parser_inputs(), outputs=(scores,), axes=(_batch(), _turns(config), *_parser_axes(config)))


def encoder_signature(config: Config) -> Signature:
    return _text_signature("context_vector", config["context_width"], config["max_tokens"])


def emotion_signature(config: Config) -> Signature:
    return _text_signature("turn_emotion", len(EMOTIONS), config["turn_tokens"])


def _text_signature(name: str, width: int, longest: int) -> Signature:
    return Signature(
        inputs=(TensorSpec(name="token_ids", dtype="int64", shape=("batch", "tokens")),),
        outputs=(TensorSpec(name=name, dtype="float32", shape=("batch", width)),),
        axes=(_batch(), _tokens("tokens", longest)),
    )


def _tokens(name: str, longest: int) -> Axis:
    return Axis(name=name, min=2, opt=max(2, longest // 2), max=longest)


def check(config: Config) -> None:
    """`InputError` unless a model of this config can be built."""
    for name, choices in CHOICES.items():
        if config[name] not in choices:
            raise InputError(f"expected {name} of {', '.join(choices)}; found '{config[name]}'")
    for name, least in {"hg_dim": 1, "max_tokens": 4, "turn_tokens": 4, "max_turns": 2, "context_width": 1}.items():
        if config[name] < least:
            raise InputError(f"expected {name} of {least} or more, found {config[name]}")
    if config["temperature"] <= 0:
        raise InputError(f"expected a temperature above 0, found {config['temperature']}")

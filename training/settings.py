"""Training settings: those that every model has, and the user's changes to them and to a config."""

import math
from collections.abc import Mapping
from typing import Any

from runtimes.errors import InputError, unknown_name
from training.config import Config
from training.spec import ModelSpec

# The settings of every model, besides its own; a preset may have other defaults.
COMMON: Config = {
    "accumulate": 1,  # batches whose gradients are added up before a step
    "beta2": 0.999,  # of Adam
    "clip": 1.0,  # largest norm of the gradient
    "device": "auto",  # or cpu
    "gradient_checkpointing": False,
    "optimizer": "adamw_torch",  # or another of the Trainer's, such as adamw_bnb_8bit
    "patience": 0,  # epochs without a better validation loss before the end; 0 is never
    "precision": "fp32",  # or bf16 or fp16: mixed precision
    "scheduler": "cosine",  # or trapezoid (rises, stays, falls in straight lines), plateau, or one of the Trainer's
    "seed": 0,
    "warmup": 0.05,  # below 1 a share of all steps, else a number of steps
    "weight_decay": 0.0,
    "workers": 0,  # processes that make batches ahead of time
}
CHOICES = {"device": ("auto", "cpu"), "precision": ("fp32", "bf16", "fp16")}
POSITIVE = ("lr", "batch", "epochs", "accumulate", "clip")
NOT_NEGATIVE = ("seed", "patience", "warmup", "weight_decay", "workers")


def check_training(training: Config) -> None:
    """`InputError` for a setting with which nothing can be trained."""
    for name in POSITIVE:
        if training.get(name, 1) <= 0:
            raise InputError(f"--set {name}: expected a number above 0, found {training[name]}")
    for name in NOT_NEGATIVE:
        if training[name] < 0:
            raise InputError(f"--set {name}: expected 0 or more, found {training[name]}")
    for name, allowed in CHOICES.items():
        if training[name] not in allowed:
            raise InputError(f"--set {name}: expected one of {', '.join(allowed)}; found '{training[name]}'")


def defaults(spec: ModelSpec, preset: str) -> tuple[Config, Config]:
    """The config and the complete training settings of a preset."""
    config = spec.preset(preset)
    return config, {**COMMON, **spec.training.settings[preset]}


def configure(spec: ModelSpec, preset: str, changes: dict[str, str]) -> tuple[Config, Config]:
    """The preset's config and training settings with the user's changes; `InputError` for a setting neither has."""
    return changed(spec, *defaults(spec, preset), changes)


def changed(spec: ModelSpec, config: Config, training: Config, changes: dict[str, str]) -> tuple[Config, Config]:
    """A config and training settings with the user's changes, and with the settings that follow from these."""
    known = (config.keys() | training.keys()) - set(spec.interface.fixed)
    for name in changes.keys() - known:
        remedy = f"list the settings: python -m training.run {spec.name} --help"
        raise unknown_name(f"setting of {spec.name}", name, known, remedy)
    own = {name: text for name, text in changes.items() if name in config}
    by_hand = {name: text for name, text in changes.items() if name in training}
    config = spec.interface.resolve_config(override(config, own))
    training = override(spec.training.implied(config, override(training, by_hand)), by_hand)
    check_training(training)
    return config, training


def override(defaults: Config, changes: Mapping[str, str]) -> Config:
    """`defaults` with the user's text values, each read as the type of the value it replaces."""
    result = dict(defaults)
    for name, text in changes.items():
        result[name] = _parse(name, text, defaults[name])
    return result


def _parse(name: str, text: str, default: Any) -> Any:
    kind = type(default)
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError("not finite")
        return value
    except (ValueError, KeyError) as error:
        raise InputError(f"--set {name}: expected {kind.__name__} such as {default}, found '{text}'") from error

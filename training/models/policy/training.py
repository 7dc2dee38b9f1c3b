"""How policies are trained. Nothing here imports torch until it is called."""

from training.config import Config
from training.recipe import Recipe, Training


def recipe() -> type[Recipe]:
    from training.models.policy.recipe import PolicyRecipe

    return PolicyRecipe


SETTINGS: Config = {
    "lr": 3e-4,
    "batch": 64,
    "epochs": 3.0,
    "window": 30,
    "carry": 16,
    "button_weight": 2.0,
    "label_smoothing": 0.0,
    "valid_share": 0.1,
    "delay": 0,
    "patience": 5,
    "windows": "auto",
    "half_table": False,
    "games": 24,
    "frames": 1200,
}

TRAINING = Training(recipe=recipe, settings={"tiny": {**SETTINGS, "lr": 2e-3, "batch": 16}, "full": SETTINGS})

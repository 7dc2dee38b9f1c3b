"""How the strategy graph is trained. Nothing here imports torch until it is called."""

from training.config import Config
from training.recipe import Recipe, Training


def recipe() -> type[Recipe]:
    from training.models.strategy.recipe import StrategyRecipe

    return StrategyRecipe


SETTINGS: Config = {
    "lr": 3e-5,
    "weight_decay": 1e-2,
    "batch": 8,
    "epochs": 8.0,
    "warmup": 0.1,
    "scheduler": "linear",
    "history": 16,
    "valid_share": 0.15,
    "class_weights": 0.5,
    "rgat": "pyg",
    "prune": 0.0,  # edges with less attention are removed after the first epoch
    "store": "",
    "dialogues": 150,
}

TRAINING = Training(
    recipe=recipe,
    settings={"tiny": {**SETTINGS, "lr": 2e-3, "batch": 32, "epochs": 20.0}, "full": SETTINGS},
)

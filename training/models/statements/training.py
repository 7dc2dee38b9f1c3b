"""How the statement embedder is trained. Nothing here imports torch until it is called."""

from typing import TYPE_CHECKING, Any

from training.config import Config
from training.recipe import Recipe, TextEmbedder, Training
from training.spec import find_spec

if TYPE_CHECKING:
    from training.checkpoint import Checkpoint


def recipe() -> type[Recipe]:
    from training.models.statements.recipe import StatementsRecipe

    return StatementsRecipe


def embedder(checkpoint: "Checkpoint", **options: Any) -> TextEmbedder:
    from training.models.statements.embedding import open_embedder

    return open_embedder(checkpoint, find_spec(checkpoint.model), **options)


SETTINGS: Config = {
    "lr": 1e-3,
    "weight_decay": 1e-2,
    "batch": 1024,  # pairs on each device; all of them are negatives of each other
    "micro": 8,  # statements whose activations are in memory at once
    "epochs": 10.0,
    "warmup": 100.0,
    "temperature": 0.07,
    "valid_share": 0.2,
    "seed": 42,
    "quantize": "none",  # or nf4: QLoRA
    "papers": 200,  # of synthetic data
}

TRAINING = Training(
    recipe=recipe,
    settings={
        "tiny": {**SETTINGS, "batch": 32, "micro": 64, "epochs": 12.0, "warmup": 0.1, "lr": 3e-3},
        "full": SETTINGS,
    },
    embedder=embedder,
)

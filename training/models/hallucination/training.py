"""How the hallucination scorer is fitted. Nothing here imports torch until it is called."""

from training.config import Config
from training.recipe import Recipe, Training

SETTINGS: Config = {
    "scores": "",  # a score log to use in place of features read from texts
    "fit": "grid",  # or published: top_n, top_k, alpha and m as they stand
    "select": "auc",  # or mi: what heads and layers are ranked by
    "top_n": 3,
    "top_k": 4,
    "alpha": 0.6,
    "m": 1.0,
    "folds": 5,
    "most": 7,  # heads, and layers, that the grid goes up to
    "ensemble": 1,  # selections whose scores are averaged
    "valid_share": 0.25,
    "generator": "",  # only answers of this model
    "store": "",
    "read_heads": "",  # what features are read of, to choose from; "" is heads and layers
    "read_layers": "",
    "responses": 120,
    "longest": 0,  # tokens that are read of an answer in its context; 0 is max_tokens
    "loading": "fp32",  # or fp16, bf16, int8, nf4, or stored: as the checkpoint has it
    "device_map": "",  # or auto, balanced: accelerate spreads the layers over GPUs, and the CPU
    "max_memory": "",  # such as '0:12GiB cpu:20GiB'
    "compile": False,  # the layers, by torch.compile
    "padded_size": 8192,  # tokens of a batch, padding included
    "profile": "",  # settings of a known machine, or auto
}


def detector_recipe() -> type[Recipe]:
    from training.models.hallucination.recipe import HallucinationRecipe

    return HallucinationRecipe


def scorer_recipe() -> type[Recipe]:
    from training.models.hallucination.recipe import ScorerRecipe

    return ScorerRecipe


def implied(config: Config, training: Config) -> Config:
    """The settings with those of their profile."""
    if not training["profile"]:
        return training
    from training.models.hallucination.loading import with_profile

    return with_profile(training, config)


DETECTOR = Training(
    recipe=detector_recipe,
    settings={"tiny": SETTINGS, "full": {**SETTINGS, "loading": "fp16", "profile": "auto"}},
    implied=implied,
)
SCORER = Training(recipe=scorer_recipe, settings={"tiny": SETTINGS})

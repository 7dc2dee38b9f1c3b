"""How an H-Net is trained: settings with their meaning and their names in the tuning guide for Telugu.

Nothing here imports torch until it is called.
"""

from training.config import Config
from training.models.hnet.experiments import SWEEP
from training.recipe import Recipe, Training


def recipe() -> type[Recipe]:
    from training.models.hnet.recipe import HNetRecipe

    return HNetRecipe


SETTINGS: Config = {
    "lr": 3e-4,
    "batch": 32,
    "epochs": 50.0,
    "warmup": 0.1,
    "scheduler": "cosine",
    "weight_decay": 0.01,
    "beta2": 0.95,
    "patience": 10,
    "n_compress": "1 5",
    "alpha": 0.03,
    "warmup_compression_epochs": 0,
    "lr_by_stage": True,
    "max_bytes": 1024,
    "unit": "document",
    "epoch_bytes": 0,
    "judge_bytes": 65_536,
    "evaluate_bytes": 0,
    "least_code_points": 1.5,
    "texts": 400,
}
NOTES = {
    "model_arch": "MODEL_ARCH: encoder (its mirror: decoder), main network; m Mamba-2, T attention, capital: with MLP",
    "model_dim": "MODEL_DIM: width of each stage, the outermost first; multiples of 64",
    "d_state": "numbers in the state of each Mamba-2 channel",
    "attention_window": "bytes that attention of an outer stage sees before its own",
    "attention_capacity": "chunks that attention of the innermost stage sees; more than a text has is all",
    "align": "utf8: no segment begins inside a code point; none: the public models",
    "lr": "Learning Rate (lr): of a stage with multiplier 1; see lr_by_stage",
    "batch": "Batch Size (BATCH_SIZE): pieces of text a step and device",
    "accumulate": "gradient accumulation: batches added up before a step",
    "epochs": "epochs at most; see epoch_bytes",
    "warmup": "share of the steps (or their number) in which the learning rate rises",
    "scheduler": "Scheduler: cosine, trapezoid, plateau (ReduceLROnPlateau), or another of the Trainer's",
    "weight_decay": "Weight Decay; not on norms, biases, A_log, dt_bias, D",
    "patience": "Patience (PATIENCE): epochs without a better criterion before the end; 0 is never",
    "clip": "largest norm of the gradient",
    "n_compress": "Compression Target (N_compress): bytes a position of each stage, '1 5' or '1 3 9'",
    "alpha": "Ratio Loss Coefficient (alpha): the paper's 0.03; the guide's former implicit value is 1",
    "warmup_compression_epochs": "Warmup for Compression: epochs in which alpha rises to its value",
    "lr_by_stage": "whether each stage has the paper's multiplier of the learning rate",
    "max_bytes": "bytes of a piece: longer documents are cut, so that memory stays the same",
    "unit": "document: texts end at blank lines; line: each line is a text",
    "epoch_bytes": "bytes of text of an epoch, which ends with an evaluation; 0 is all",
    "judge_bytes": "bytes of held-out text for the evaluation after an epoch",
    "evaluate_bytes": "bytes of held-out text for the final evaluation; 0 is all",
    "least_code_points": "code points a segment below which the selection criterion of a checkpoint becomes worse",
    "texts": "texts of synthetic data",
}
TRAINING = Training(
    recipe=recipe,
    settings={
        "tiny": {**SETTINGS, "lr": 2e-3, "batch": 16, "epochs": 3.0, "max_bytes": 256},
        "full": SETTINGS,
    },
    notes=NOTES,
    sweep=SWEEP,
)

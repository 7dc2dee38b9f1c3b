"""The configs of the policies, and the sizes that their tensors may have."""

from runtimes.tensors import Axis
from training.config import Config

BACKBONES = ("lstm", "gru", "mamba", "attention", "jamba")
TIME_MAX = 512  # 8.5 seconds of play: whole windows, and the rollouts that verify a carried state
AXES = (Axis(name="batch", min=1, opt=8, max=32), Axis(name="time", min=1, opt=30, max=TIME_MAX))
CONFIG: Config = {
    "hidden": 256,
    "layers": 1,
    "id_width": 64,
    "previous_controller": False,
    "dropout": 0.1,
    "heads": 4,
    "attention_window": 30,
    "attention_every": 3,
}
TINY: Config = {"hidden": 64, "id_width": 8, "dropout": 0.0}
LAYERS = {"lstm": 1, "gru": 1, "mamba": 2, "attention": 2, "jamba": 6}

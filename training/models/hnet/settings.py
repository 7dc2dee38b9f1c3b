"""The configs of an H-Net, and the sizes that its tensors may have."""

from runtimes.tensors import Axis
from training.config import Config

TIME_MAX = 1024  # bytes of a text, with the byte that begins it
AXES = (Axis(name="batch", min=1, opt=4, max=16), Axis(name="time", min=1, opt=256, max=TIME_MAX))
CONFIG: Config = {
    "model_arch": "m2 T4",
    "model_dim": "256 256",
    "d_state": 128,
    "attention_window": 1023,
    "attention_capacity": 1024,
    "align": "none",
}
TINY: Config = {"model_arch": "m1 T1", "model_dim": "64 64", "d_state": 16}

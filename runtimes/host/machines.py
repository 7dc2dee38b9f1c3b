"""Named machines: the memory of their accelerator, and how a large frozen decoder is loaded on it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """One accelerator of a named machine, and the memory on it that a model may use.

    `holding` are settings of a decoder's reading: a batch has padded_size // longest of the longest texts.
    """

    gpu: str
    memory_bytes: int
    holding: Mapping[str, Any]


MACHINES = {
    "kaggle-2xt4": Machine(
        gpu="Tesla T4",
        memory_bytes=12 * GIB,
        holding={
            "loading": "nf4",
            "device_map": "balanced",
            "max_memory": "0:12GiB 1:12GiB",
            "longest": 6000,
            "padded_size": 6000,
        },
    ),
    "colab-t4": Machine(
        gpu="Tesla T4",
        memory_bytes=14 * GIB,
        holding={
            "loading": "nf4",
            "device_map": "auto",
            "max_memory": "0:14GiB",
            "longest": 4000,
            "padded_size": 4000,
        },
    ),
    "colab-a100": Machine(
        gpu="A100",
        memory_bytes=35 * GIB,
        holding={
            "loading": "int8",
            "device_map": "auto",
            "max_memory": "0:35GiB",
            "longest": 12_000,
            "padded_size": 48_000,
        },
    ),
    "rtx-4090": Machine(
        gpu="RTX 4090",
        memory_bytes=20 * GIB,
        holding={
            "loading": "fp16",
            "device_map": "auto",
            "max_memory": "",
            "longest": 16_000,
            "padded_size": 128_000,
        },
    ),
}

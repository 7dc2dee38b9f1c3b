"""The NVIDIA GPU of this machine by a query of the driver, without CUDA libraries or torch."""

import ctypes
from dataclasses import dataclass
from functools import cache

DEVICES = ("cpu", "cuda")
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{MAJOR,MINOR}


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """The first GPU: its name and compute capability, such as sm_90."""

    name: str
    architecture: str


@cache
def gpu() -> Gpu | None:
    """The first GPU that the driver reports, or None. TensorRT 11 crashes without one: check this first."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, device, major, minor = (ctypes.c_int() for _ in range(4))
    name = ctypes.create_string_buffer(100)
    calls = (
        lambda: driver.cuInit(0),
        lambda: driver.cuDeviceGetCount(ctypes.byref(count)),
        lambda: driver.cuDeviceGet(ctypes.byref(device), 0),
        lambda: driver.cuDeviceGetName(name, len(name), device),
        lambda: driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device),
        lambda: driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device),
    )
    if any(call() != 0 for call in calls):
        return None
    return Gpu(name=name.value.decode(), architecture=f"sm_{major.value}{minor.value}")

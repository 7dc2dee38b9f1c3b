"""What NVIDIA's management library says of the first GPU, asked by ctypes: memory of processes, clocks, limits.

Written against the documented C interface of libnvidia-ml (NVML API reference). Not run yet: no GPU was at hand.
"""

import ctypes
from functools import cache
from typing import Any

_GRAPHICS, _SM, _MEMORY = 0, 1, 2  # nvmlClockType_t
_MOST_PROCESSES = 256
_NOT_AVAILABLE = 2**64 - 1  # NVML_VALUE_NOT_AVAILABLE, of a process whose memory the driver does not tell


class _Process(ctypes.Structure):  # nvmlProcessInfo_t, as nvmlDeviceGetComputeRunningProcesses_v3 fills it
    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class Nvml:
    """The library, opened, and its handle of the first GPU. What a driver does not answer is None."""

    def __init__(self, library: Any, device: ctypes.c_void_p) -> None:
        self.library = library
        self.device = device

    def process_bytes(self) -> dict[int, int | None]:
        """By process id, what computing processes hold. Inside a container the ids may be those of the host."""
        count = ctypes.c_uint(_MOST_PROCESSES)
        found = (_Process * _MOST_PROCESSES)()
        if not self._ask("nvmlDeviceGetComputeRunningProcesses_v3", ctypes.byref(count), found):
            return {}
        known = ((int(each.pid), int(each.used)) for each in found[: count.value])
        return {pid: None if used == _NOT_AVAILABLE else used for pid, used in known}

    def state(self) -> dict[str, int | str | None]:
        """Driver, clocks in MHz, power limit in milliwatts, MIG mode, and the mask of reasons for lower clocks."""
        driver = ctypes.create_string_buffer(80)
        known = self.library.nvmlSystemGetDriverVersion(driver, len(driver)) == 0
        return {
            "driver": driver.value.decode() if known else None,
            "graphics_mhz": self._number("nvmlDeviceGetClockInfo", _GRAPHICS),
            "sm_mhz": self._number("nvmlDeviceGetClockInfo", _SM),
            "memory_mhz": self._number("nvmlDeviceGetClockInfo", _MEMORY),
            "power_limit_mw": self._number("nvmlDeviceGetEnforcedPowerLimit"),
            "throttle_reasons": self._number("nvmlDeviceGetCurrentClocksThrottleReasons", kind=ctypes.c_ulonglong),
            "mig": self._mig(),
        }

    def _ask(self, function: str, *arguments: Any) -> bool:
        return getattr(self.library, function)(self.device, *arguments) == 0

    def _number(self, function: str, *arguments: int, kind: Any = ctypes.c_uint) -> int | None:
        found = kind()
        return int(found.value) if self._ask(function, *arguments, ctypes.byref(found)) else None

    def _mig(self) -> int | None:
        current, pending = ctypes.c_uint(), ctypes.c_uint()
        asked = self._ask("nvmlDeviceGetMigMode", ctypes.byref(current), ctypes.byref(pending))
        return int(current.value) if asked else None


@cache
def nvml() -> Nvml | None:
    """The library with the first GPU, or None where either is missing."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    device = ctypes.c_void_p()
    if library.nvmlInit_v2() != 0 or library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)) != 0:
        return None
    return Nvml(library, device)

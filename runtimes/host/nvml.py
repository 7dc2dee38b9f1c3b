"""State of the first visible GPU by NVIDIA's management library (nvidia-ml-py): memory of processes, clocks, limits.

Not run on a GPU yet: none was at hand. Values are those of the C interface (NVML API reference).
"""

import os
from functools import cache
from importlib import import_module
from typing import Any


class Nvml:
    """The library `pynvml`, opened, and its handle of one GPU. A value that the driver does not give is None."""

    def __init__(self, library: Any, device: Any) -> None:
        self.library = library
        self.device = device

    def process_bytes(self) -> dict[int, int | None]:
        """Bytes that computing processes hold, by process id. In a container the ids may be those of the host."""
        found = self._ask("nvmlDeviceGetComputeRunningProcesses", self.device) or []
        return {int(each.pid): each.usedGpuMemory for each in found}

    def state(self) -> dict[str, int | str | None]:
        """Driver, clocks in MHz, power limit in milliwatts, MIG mode, and the mask of reasons for lower clocks."""
        mig = self._ask("nvmlDeviceGetMigMode", self.device)
        return {
            "driver": self._ask("nvmlSystemGetDriverVersion"),
            "graphics_mhz": self._clock("NVML_CLOCK_GRAPHICS"),
            "sm_mhz": self._clock("NVML_CLOCK_SM"),
            "memory_mhz": self._clock("NVML_CLOCK_MEM"),
            "power_limit_mw": self._ask("nvmlDeviceGetEnforcedPowerLimit", self.device),
            "throttle_reasons": self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", self.device),
            "mig": None if mig is None else mig[0],  # [current, pending]
        }

    def _clock(self, kind: str) -> int | None:
        clock: int | None = self._ask("nvmlDeviceGetClockInfo", self.device, getattr(self.library, kind))
        return clock

    def _ask(self, function: str, *arguments: Any) -> Any:
        """The value of a call, or None where the driver or the installed pynvml lacks the function or the value."""
        try:
            return getattr(self.library, function)(*arguments)
        except (self.library.NVMLError, AttributeError):
            return None


@cache
def nvml() -> Nvml | None:
    """The library with the first visible GPU; None without the package nvidia-ml-py, a driver or a GPU."""
    try:
        library = import_module("pynvml")
    except ImportError:
        return None
    return open_nvml(library, os.environ.get("CUDA_VISIBLE_DEVICES"))


def open_nvml(library: Any, visible: str | None) -> Nvml | None:
    """The first GPU of `visible`, the value of CUDA_VISIBLE_DEVICES: an index (in PCI order) or a full UUID.

    GPU 0 where the variable is not set; None where it hides all GPUs or names one that the driver does not know.
    """
    first = "0" if visible is None else visible.partition(",")[0].strip()
    try:
        library.nvmlInit()
        if first.isdecimal():
            return Nvml(library, library.nvmlDeviceGetHandleByIndex(int(first)))
        return Nvml(library, library.nvmlDeviceGetHandleByUUID(first)) if first.startswith(("GPU-", "MIG-")) else None
    except library.NVMLError:
        return None

"""A measurement and an artifact made by hand."""

from types import SimpleNamespace
from typing import Any

from runtimes.bench.load import Window
from runtimes.bench.measure import Measurement
from runtimes.host.memory_sampler import Peak

TOY: Any = SimpleNamespace(name="toy", parity={}, model="toy", target="onnx", precision="fp32", checkpoint="1")
STEP = {"batch": 1, "time": 1}


def measurement(windows: list[list[float]], batch: int = 1) -> Measurement:
    return Measurement(
        engine="toy",
        provider="toy",
        sizes={"batch": batch},
        load_s=0.5,
        first_call_s=0.1,
        warmup_s=0.2,
        warmup_calls=10,
        memory=Peak(memory_bytes=10_000_000),
        windows=[Window(samples_s=each, wall_s=sum(each), cpu_s=2 * sum(each)) for each in windows],
    )

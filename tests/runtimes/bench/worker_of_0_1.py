"""The worker of version 0.1 reduced to its protocol: same words, arguments and answers, with made-up times.

It needs nothing but Python, so that it stands for an older checkout: `runtimes/worker.py` there, PROTOCOL 1.
"""

import json
import socket
import sys


class Bench:
    """The acts of version 0.1; a request with another word or argument fails."""

    def prepare(self, sizes: dict) -> dict:
        return {"provider": "0.1", "first_call_s": 0.5, "warmup_s": 0.2, "warmup_calls": sum(sizes.values())}

    def one_by_one(self, seconds: float) -> dict:
        return window(samples_s=[seconds] * 3)

    def side_by_side(self, lanes: int, seconds: float) -> dict:
        return window(samples_s=[seconds] * lanes)

    def arriving(self, rate_per_s: float, seconds: float, seed: list) -> dict:
        return window(samples_s=[seconds] * len(seed), rate_per_s=rate_per_s)


def window(**changes: object) -> dict:
    fields = {"samples_s": [], "wall_s": 1.0, "cpu_s": 0.5, "refused": 0, "device_s": [], "rate_per_s": 0.0}
    return {**fields, "service_s": [], "alone_s": [], "busy_s": 0.0, "late": 0, **changes}


def main() -> None:
    with socket.socket(fileno=int(sys.argv[1])) as pipe, pipe.makefile("r") as questions:
        opening = json.loads(next(questions))
        engine = opening["options"].get("engine", "onnxruntime")
        answers = {"engine": engine, "remote": False, "load_s": 0.1, "protocol": 1}
        pipe.sendall(json.dumps({"ok": answers}).encode() + b"\n")
        for line in questions:
            question = json.loads(line)
            answer = getattr(Bench(), question.pop("do"))(**question)
            pipe.sendall(json.dumps({"ok": answer}).encode() + b"\n")


if __name__ == "__main__":
    main()

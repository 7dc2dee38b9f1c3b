"""Parity: a converted model against its original, in numbers, in decisions and over time."""

from collections.abc import Iterator, Mapping

import numpy as np

from export.source import Source
from runtimes.artifact import Check
from runtimes.errors import ParityError
from runtimes.runtime import Runtime
from runtimes.tensors import Signature, Tensors
from training.spec import Tolerance

ROLLOUT_STEPS = 300
ROLLOUT_BATCH = 3  # no axis is traced at 3
Checks = dict[str, Check]


def check_parity(candidate: Runtime, source: Source, precision: str) -> Checks:
    """Every check of a candidate against its original; the worst result over all sizes, real inputs and a rollout."""
    tolerance = source.spec.parity.tolerance[precision]
    rng = np.random.default_rng(0)
    checks: Checks = {}
    for sizes in sizes_to_check(source.signature):
        inputs = source.draw_inputs(rng, sizes)
        _keep_worst(checks, compare(source, candidate.fresh(inputs), source.answer(inputs), tolerance))
    if real := list(source.spec.parity.parity_inputs(source.config, source.sample_inputs)):
        got = _joined([candidate.fresh(inputs) for inputs in real])
        want = _joined([source.answer(inputs) for inputs in real])
        _keep_worst(checks, compare(source, got, want, tolerance))
    if source.signature.state:
        got, want = rollout(candidate, source, rng)
        rolled = compare(source, got, want, tolerance)
        _keep_worst(checks, {f"rollout_{name}": check for name, check in rolled.items()})
    return checks


def require_passed(checks: Mapping[str, Check]) -> None:
    """`ParityError` naming the first check that failed and how many did."""
    failed = {name: check for name, check in checks.items() if not check.passed}
    if failed:
        name, check = next(iter(failed.items()))
        relation = ">=" if check.at_least else "<="
        raise ParityError(
            f"{len(failed)} of {len(checks)} parity checks failed, first {name}: "
            f"expected {relation} {check.limit:g}, found {check.value:g}; not published"
        )


def sizes_to_check(signature: Signature) -> Iterator[dict[str, int]]:
    """All axes at min, all at opt, and each at its max with the others at min."""
    yield signature.sizes("min")
    yield signature.sizes("opt")
    for axis in signature.axes:
        yield {**signature.sizes("min"), axis.name: axis.max}


def compare(source: Source, got: Tensors, want: Tensors, tolerance: Tolerance) -> Checks:
    """Difference by output, in units of the tolerance, and the model's own agreement of decisions."""
    printed, got = got, source.spec.parity.mask_near_ties(got, want, tolerance)
    checks = {
        f"difference_{name}": Check(value=_in_tolerances(got[name], want[name], tolerance), limit=1.0)
        for name in want
        if name in got  # a server does not return the state
    }
    return {**checks, **source.spec.parity.agreement(printed, want, tolerance)}


def rollout(candidate: Runtime, source: Source, rng: np.random.Generator) -> tuple[Tensors, Tensors]:
    """(candidate step by step, original in one piece) over ROLLOUT_STEPS with one row reset half-way.

    Visible outputs [batch, ROLLOUT_STEPS, ...]. From the reset on, the row must equal a new one.
    """
    half, row = ROLLOUT_STEPS // 2, 1
    inputs = source.draw_inputs(rng, {"batch": ROLLOUT_BATCH, "time": ROLLOUT_STEPS})
    stream = candidate.stream(ROLLOUT_BATCH)
    steps = []
    for t in range(ROLLOUT_STEPS):
        if t == half:
            stream.reset([row])
        steps.append(stream.step({name: array[:, t : t + 1] for name, array in inputs.items()}))
    stream.close()
    visible = [tensor.name for tensor in source.signature.visible_outputs]
    got = {name: np.concatenate([step[name] for step in steps], 1) for name in visible}
    want = source.sequence(inputs)
    fresh = source.sequence({name: array[:, half:] for name, array in inputs.items()})
    for name in visible:
        want[name][row, half:] = fresh[name][row]
    return got, want


def _joined(batches: list[Tensors]) -> Tensors:
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def _in_tolerances(got: np.ndarray, want: np.ndarray, tolerance: Tolerance) -> float:
    """The largest |got - want| in units of the tolerance; 1 is the limit. NaN if either side holds one."""
    if got.shape != want.shape:
        return float("inf")
    wanted = want.astype(np.float64)
    allowed = tolerance.absolute + tolerance.relative * np.abs(wanted)
    return float((np.abs(got.astype(np.float64) - wanted) / allowed).max(initial=0.0))


def _keep_worst(checks: Checks, new: Checks) -> None:
    for name, check in new.items():
        old = checks.get(name)
        if old is None:
            checks[name] = check
        elif old.passed:  # a failure stays: every comparison with NaN is false
            worse = check.value < old.value if check.at_least else check.value > old.value
            checks[name] = check if worse or not check.passed else old

"""Requests that are nearly right: an example with a few of its parts changed, left out or added, for hypothesis."""

import copy
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=2**63, max_value=2**80),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["", " ", "\ud800", "\0", "'; --", "../../etc/passwd", "ఆమె", "😀" * 50]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


@st.composite
def nearly(draw: st.DrawFn, example: Any) -> Any:
    """`example` after one to three changes, each somewhere in it."""
    changed = [copy.deepcopy(example)]
    for _ in range(draw(st.integers(1, 3))):
        holder, key = draw(st.sampled_from(list(places(changed))))
        kind = draw(st.sampled_from(["nudge", "nudge", "replace", "drop", "add", "repeat"]))
        inside = holder[key]
        if kind == "drop" and holder is not changed:
            del holder[key]
        elif kind == "add" and isinstance(inside, dict):
            inside[draw(st.text(max_size=8))] = draw(VALUES)
        elif kind == "repeat" and isinstance(inside, list):
            inside.extend(copy.deepcopy(inside) * draw(st.sampled_from([1, 40])))
        else:
            holder[key] = draw(alike(inside) if kind == "nudge" else VALUES)
    return changed[0]


def alike(value: Any) -> st.SearchStrategy[Any]:
    """Values of the same kind, many of them still right."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int | float):
        return st.sampled_from([0, 1, 2, -1, 1.0, 0.5, 1e6, -1e6, value + 1]) | st.floats(-1e5, 1e5)
    if isinstance(value, str):
        return st.text(max_size=200)
    return st.just(value)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (list or object, index or key) inside a list or object; of a long list only the first few."""
    keys = list(value) if isinstance(value, dict) else range(min(len(value), 4))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])

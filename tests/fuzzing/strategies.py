"""Near-valid inputs for hypothesis: what makes an input valid is kept, one part of it is anything.

Hypothesis shrinks what it finds, which a seeded mutator cannot; so these build documents rather than bytes where they
can.
"""

from __future__ import annotations

import json
import random
from typing import Any

from hypothesis import strategies as st

from tests.fuzzing.harness import Target
from tests.fuzzing.mutation import mutate

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


def inputs(target: Target) -> st.SearchStrategy[bytes]:
    """Valid inputs with a few changes, documents with one value replaced, and programs of any bytes."""
    seeds = list(target.seeds)
    changed = st.builds(
        lambda seed, number: mutate(seed, random.Random(number), seeds, text=target.text),
        st.sampled_from(seeds),
        st.integers(0, 2**32 - 1),
    )
    documents = [seed for seed in seeds if target.text and seed[:1] == b"{"]
    if documents:
        return changed | st.sampled_from(documents).flatmap(_with_one_value_replaced)
    return changed | st.binary(max_size=150)


def _with_one_value_replaced(seed: bytes) -> st.SearchStrategy[bytes]:
    text = seed.decode("latin-1")
    document, end = json.JSONDecoder().raw_decode(text)
    places = list(_paths(document))
    return st.builds(
        lambda path, value: json.dumps(_replaced(document, path, value)).encode() + seed[end:],
        st.sampled_from(places),
        JSON_VALUES,
    )


def _paths(document: Any, path: tuple[Any, ...] = ()) -> Any:
    pairs = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in pairs:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from _paths(value, (*path, key))


def _replaced(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    key, *rest = path
    copy = dict(document) if isinstance(document, dict) else list(document)
    copy[key] = _replaced(document[key], tuple(rest), value)
    return copy

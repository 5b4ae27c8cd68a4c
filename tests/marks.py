"""Which cases of a test only `make test-slow` runs: more of a kind, and what takes long."""

from collections.abc import Collection, Iterable

import pytest


def slow(*values):
    """One case of `parametrize` that is slow."""
    return pytest.param(*values, marks=pytest.mark.slow)


def slow_but(fast: Collection, cases: Iterable) -> list:
    """The cases of `parametrize`, each one value: all are slow except `fast`, which must be among them."""
    cases = list(cases)
    assert all(case in cases for case in fast), f"{fast} of {cases}"
    return [case if case in fast else slow(case) for case in cases]

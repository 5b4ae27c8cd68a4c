"""Rows in which every pair of values meets: a covering array, made greedily, the same in every run.

With ten choices of three values each, 59,049 combinations become some twenty rows, and a defect that takes
two choices to show shows in one of them (Cohen et al., The AETG system, IEEE TSE 1997).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Pair = tuple[tuple[str, Any], tuple[str, Any]]
TRIES = 2  # rows of the pool for each pair of choices


def pairs_of(row: Row, aspects: Mapping[str, Callable[[Row], Any]], wanted: Sequence[tuple[str, str]]):
    """The pairs that a whole row has: ((aspect, value), (aspect, value))."""
    seen = {name: aspect(row) for name, aspect in aspects.items()}
    return {((a, seen[a]), (b, seen[b])) for a, b in wanted}


def cover(
    choices: Mapping[str, Sequence[Any]],
    aspects: Mapping[str, Callable[[Row], Any]],
    wanted: Sequence[tuple[str, str]],
    allowed: Callable[[Row], bool],
    taken: Sequence[Row] = (),
) -> tuple[list[Row], set[Pair]]:
    """Rows, one value for each of `choices`, and the pairs that they cover together with the rows `taken`.

    aspects: what of a row is looked at, by name. wanted: the two aspects of each kind of pair. Rows are taken
    from a pool that has every pair of choices that an allowed row can have.
    """
    # All allowed rows would be millions. The pool has each pair of choices, with the rest drawn in a fixed
    # order until the row is allowed.
    pool: list[Row] = []
    for a, b in itertools.combinations(choices, 2):
        for x, y in itertools.product(choices[a], choices[b]):
            drawn = (_drawn(choices, len(pool) + step) | {a: x, b: y} for step in range(60 * TRIES))
            pool += itertools.islice(filter(allowed, drawn), TRIES)
    numbers: dict[Pair, int] = {}
    bits = lambda row: sum(
        1 << numbers.setdefault(pair, len(numbers)) for pair in pairs_of(row, aspects, wanted)
    )
    has = [bits(row) for row in pool]
    left, rows = (1 << len(numbers)) - 1, []
    for row in taken:
        left &= ~bits(row)
    while left:
        gain = lambda covered: (covered & left).bit_count()  # noqa: B023
        best = max(range(len(pool)), key=lambda i: gain(has[i]))
        row, covered, better = pool[best], has[best], True
        while better:  # and what is near to it
            better = False
            for name, values in choices.items():
                for value in values:
                    near = row | {name: value}
                    if allowed(near) and gain(found := bits(near)) > gain(covered):
                        row, covered, better = near, found, True
        rows.append(row)
        left &= ~covered
    return rows, set(numbers)


def _drawn(choices: Mapping[str, Sequence[Any]], number: int) -> Row:
    """Row `number` of an endless list in which all values are spread well, the same in every run."""
    row = {}
    for place, (name, values) in enumerate(choices.items()):
        mixed = (number * 2654435761 + place * 40503 * (number + 1)) % 2**32
        row[name] = values[(mixed >> 9) % len(values)]
    return row

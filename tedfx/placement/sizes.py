"""Sizes of dims: whole numbers, or expressions in the size symbols of the trace.

Where a model only accepts an even batch (`x.view(2, -1)`, `x[::2] * x[1::2]`), torch.export writes that size
as `2*s` and all other sizes in terms of `s`. `symbol_of` and `solve` lead from such a size to its symbol and
back. `s` is a whole number for every size that the model accepts, so sizes made from it need no division; a
factor of the size `2*s` may be refined into (s, 2), pairs of neighbours, which a shard of the first part
keeps together (`tedfx/placement/factors.py`).
"""

# sympy has no types: what its functions return is unknown to the checker here, and known behind this file.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import sympy

Symbol: TypeAlias = sympy.Symbol
Size: TypeAlias = int | sympy.Expr


def as_size(value: Any) -> Size:
    """An int where the value is known, else its sympy expression (accepts int, SymInt, sympy)."""
    node = getattr(value, "node", None)
    if node is not None and hasattr(node, "expr"):
        value = node.expr
    if isinstance(value, sympy.Expr):
        return int(value) if value.is_Integer else value
    return int(value)


def symbols_of(value: Any) -> set[Symbol]:
    """The symbols in a number (an int, torch's SymInt, SymFloat or SymBool, or sympy's)."""
    expression = getattr(getattr(value, "node", None), "expr", value)
    return {s for s in getattr(expression, "free_symbols", ()) if isinstance(s, sympy.Symbol)}


_SAMPLED = (1, 2, 3, 4, 7, 8, 9, 16, 61, 512, 4097)


def samples(condition: sympy.Basic) -> Iterator[dict[Symbol, int]]:
    """Values of the symbols of a condition: small, large, even and odd ones, in all combinations."""
    symbols = sorted(symbols_of(condition), key=str)
    return (dict(zip(symbols, values)) for values in itertools.product(_SAMPLED, repeat=len(symbols)))


def holds(condition: sympy.Basic, sizes: Mapping[Symbol, int]) -> bool | None:
    """Whether a condition holds of these sizes; None where they do not settle it. One that divides by a size
    that is zero then does not hold."""
    try:
        value = condition.subs(list[Any](sizes.items()))
    except ZeroDivisionError:
        return False
    return True if value == sympy.true else False if value == sympy.false else None


def at_least_zero(size: Size) -> bool:
    """Whether a size is 0 or more in all of a sample (`90 - batch` is not)."""
    return all(holds(sympy.Ge(size, 0), each) for each in samples(sympy.sympify(size)))


def product(sizes: Iterable[Size]) -> Size:
    sizes = list(sizes)
    if len(sizes) == 1:
        return sizes[0]
    whole = [s for s in sizes if isinstance(s, int)]
    return math.prod(whole) if len(whole) == len(sizes) else as_size(sympy.prod(sizes))


def plus(a: Size, b: Size) -> Size:
    return as_size(a + b)


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are equal however they are written."""
    return sympy.expand(a - b) == 0


@functools.cache
def divides(small: Size, big: Size) -> bool:
    """Whether ``big / small`` is a whole number for all values of the symbols. An empty dim is of no other's
    parts: only an empty one is of its."""
    if small == 0 or big == 0:
        return small == big
    if isinstance(small, int) and isinstance(big, int):
        return big % small == 0
    _, denominator = sympy.fraction(sympy.cancel(sympy.sympify(big) / sympy.sympify(small)))
    return denominator == 1


@functools.cache
def quotient(big: Size, small: Size) -> Size:
    if big == small:
        return 1
    return as_size(sympy.cancel(sympy.sympify(big) / sympy.sympify(small)))


@functools.cache
def parts(big: Size, small: Size) -> int | None:
    """The size of what follows when a factor of size ``big`` is refined into (``small``, ..); None where it
    is not.

    A size with symbols is refined into (symbols, number), pairs of neighbours: any shard of the first part is
    a shard of the whole. In (number, symbols), the halves, a shard of the whole is none of either part: such
    a dim is whole, behind a barrier.
    """
    if (
        isinstance(small, int) != isinstance(big, int)
        or small == 1
        or small == big
        or not divides(small, big)
    ):
        return None
    rest = quotient(big, small)
    return rest if isinstance(rest, int) and rest > 1 else None


def is_data(size: Size) -> bool:
    """A size that only the data tells: how many elements match, how many rows an expert has."""
    return isinstance(size, sympy.Symbol) and size.name.startswith(("u", "zuf"))


def plainness(size: Size) -> tuple[bool, int, str]:
    """Sorts ways to write one size, the plainest first."""
    return any(is_data(s) for s in symbols_of(size)), int(sympy.sympify(size).count_ops()), str(size)


def estimate(size: Size, hints: Mapping[Symbol, int]) -> float:
    """A size as a number, by the hints for its symbols; 2048 for any other symbol."""
    if isinstance(size, int):
        return float(size)
    return float(size.subs({**{s: 2048 for s in size.free_symbols}, **hints}))


def symbol_of(size: Any) -> Symbol | None:
    """The symbol that a size is a multiple of, give or take a constant (`s`, `2*s`, `3*s + 1`); None for any
    other size."""
    size = as_size(size)
    if len(symbols_of(size)) != 1:
        return None
    (symbol,) = symbols_of(size)
    line = _line(size, symbol)
    return symbol if line is not None and line[0] > 0 else None


def solve(size: Any, value: Any) -> Size:
    """What the symbol of `size` is where the size is `value` (a number or an expression): `2*s` is 8 for s =
    4. ValueError where `symbol_of` knows none."""
    size = as_size(size)
    symbol = symbol_of(size)
    line = None if symbol is None else _line(size, symbol)
    if line is None:
        raise ValueError(f"{size} is no multiple of one symbol")
    return as_size((sympy.sympify(value) - line[1]) / line[0])


def _line(size: Size, symbol: Symbol) -> tuple[int, int] | None:
    """(step, start) of a size `step * symbol + start`."""
    if size == symbol:
        return 1, 0
    step, start = sympy.diff(size, symbol), sympy.sympify(size).subs(symbol, 0)
    return (int(step), int(start)) if step.is_Integer and start.is_Integer else None

"""Sorted rows that Python cuts into the experts' runs, by counts read back to the host.

    counts = ids.flatten().bincount(minlength=E)
    for e, rows in enumerate(x[order // k].split(counts.tolist())):     <- sizes that are data
        parts.append(experts[e](rows))
    done = torch.cat(parts)

While the model is traced the numbers of such counts are `Count`s, sums of the counts of some experts, which
Python may add, compare with nothing and cut tensors with. A cut at one expert's run is `expert_run`, what is
concatenated from the runs of all experts, in order, `join_runs`: operators that a trace can hold, since they
say whose rows they are. `passes/capture_sorted.py` proves that the counts are those of the ids by which the
rows were sorted, or refuses.

That an expert has rows is taken for granted, as in loops.py: the branch for one without must do nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tedfx import _torch
from tedfx.errors import TraceError
from tedfx.frontends.hits import HitExperts
from tedfx.frontends.questions import here

__all__ = ["Count", "ExpertRuns"]

T = torch.Tensor
_LISTS = {T.__iter__, T.tolist, T.unbind, torch.unbind, T.numpy}
_SPLITS = {T.split, torch.split, torch.functional.split, T.split_with_sizes, torch.split_with_sizes}
_CATS = {torch.cat, torch.concat, torch.concatenate}


class Runs:
    """The runs of one tensor of counts. `sizes`: of each expert's run, as the trace has it."""

    def __init__(self, counts: T, experts: int, asked: Callable[[], bool]):
        self.counts, self.experts, self.asked = counts, experts, asked
        self.sizes: dict[int, Any] = {}
        self.rows: T | None = None  # what was cut last

    def size(self, expert: int) -> Any:
        if expert not in self.sizes:
            size = torch.ops.tedfx.run_size(self.counts, expert).item()
            _torch.check(size > 0, "an expert without tokens was not expected here")
            self.sizes[expert] = size
        return self.sizes[expert]


class Count:
    """How many rows the experts of a set have: a number in Python that is data."""

    def __init__(self, runs: Runs, experts: frozenset[int]):
        self.runs, self.experts = runs, experts

    def __add__(self, other: object) -> Count:
        if isinstance(other, int) and other == 0:
            return self
        if isinstance(other, Count) and other.runs is self.runs and not self.experts & other.experts:
            return Count(self.runs, self.experts | other.experts)
        raise self._data()

    __radd__ = __add__

    def _of(self, other: object) -> frozenset[int]:
        """The experts of what this is compared with: nothing, or more or fewer of the same experts, in a test
        for rows."""
        none = isinstance(other, int) and other == 0
        experts = frozenset() if none else other.experts if isinstance(other, Count) else None
        if experts is None or (isinstance(other, Count) and other.runs is not self.runs):
            raise self._data()
        if self.experts != experts and not self.runs.asked():
            raise self._data()
        if not (self.experts <= experts or self.experts > experts):
            raise self._data()
        return experts

    def __eq__(self, other: object) -> bool:
        return self.experts == self._of(other)

    def __gt__(self, other: object) -> bool:
        return self.experts > self._of(other)

    def __ge__(self, other: object) -> bool:
        return self.experts >= self._of(other)

    def __lt__(self, other: object) -> bool:
        return self.experts < self._of(other)

    def __le__(self, other: object) -> bool:
        return self.experts <= self._of(other)

    def __bool__(self) -> bool:
        return self != 0

    def __hash__(self) -> int:
        return hash((id(self.runs), self.experts))

    def item(self) -> Count:
        return self

    def __index__(self) -> int:
        raise self._data()

    def _data(self) -> TraceError:
        return TraceError(
            f"Python computes with the number of an expert's rows, which is data | at {here()} | cut the "
            "sorted rows with it, rows[start:end] or rows.split(counts), or test it for zero"
        )


class ExpertRuns(TorchFunctionMode):
    """`hits`: which tensors are counts of experts' ids."""

    def __init__(self, hits: HitExperts, asked: Callable[[], bool]):
        super().__init__()
        self.hits, self.asked = hits, asked
        self.runs: dict[int, Runs] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first: Any = args[0] if args else kwargs.get("input")
        if function in _LISTS and isinstance(first, T) and id(first) in self.hits.loads:
            return self._numbers(function, first)
        if function is T.__getitem__ and isinstance(first, T) and isinstance(args[1], slice):
            if isinstance(args[1].start, Count) or isinstance(args[1].stop, Count):
                return self._slice(first, args[1])
        if function in _SPLITS and isinstance(first, T):
            sizes = args[1] if len(args) > 1 else next(v for k, v in kwargs.items() if k != "dim")
            if isinstance(sizes, (list, tuple)) and any(isinstance(size, Count) for size in sizes):
                return self._split(first, sizes, args[2] if len(args) > 2 else kwargs.get("dim", 0))
        if (
            function in _CATS
            and len(args) + len(kwargs) < 3
            and (args[1] if len(args) > 1 else kwargs.get("dim", 0)) == 0
        ):
            joined = self._join(list(args[0] if args else kwargs["tensors"]))
            if joined is not None:
                return joined
        return function(*args, **kwargs)

    def _numbers(self, function: Callable, counts: T) -> Any:
        experts, each, summed = self.hits.loads[id(counts)]
        of = self.runs.setdefault(id(each), Runs(each, experts, self.asked))
        numbers = [Count(of, frozenset(range(e + 1)) if summed else frozenset({e})) for e in range(experts)]
        if function is T.numpy:
            import numpy

            array = numpy.empty(experts, dtype=object)
            array[:] = numbers
            return array
        return (
            iter(numbers) if function is T.__iter__ else numbers if function is T.tolist else tuple(numbers)
        )

    def _slice(self, x: T, cut: slice) -> T:
        of = next(edge.runs for edge in (cut.start, cut.stop) if isinstance(edge, Count))
        start, stop = (
            edge.experts
            if isinstance(edge, Count) and edge.runs is of
            else frozenset()
            if edge in (None, 0)
            else None
            for edge in (cut.start, cut.stop)
        )
        if cut.stop is None:
            stop = frozenset(range(of.experts))
        if start is None or stop is None or cut.step is not None:
            raise Count(of, frozenset())._data()
        if not start and len(stop) == of.experts:
            return x
        (expert, *more) = sorted(stop - start) or [-1]
        if more or start != frozenset(range(expert)) or stop != start | {expert}:
            raise TraceError(
                f"rows of several experts, or of none, are cut out of sorted rows | at {here()} | cut one "
                "expert's run at a time: rows[start:start + counts[e]], in the order of the experts"
            )
        return self._run(x, of, expert)

    def _split(self, x: T, sizes: Any, dim: int) -> tuple[T, ...]:
        of = next(size.runs for size in sizes if isinstance(size, Count))
        if dim != 0 or [getattr(size, "experts", None) for size in sizes] != [{e} for e in range(of.experts)]:
            raise TraceError(
                f"sorted rows are split otherwise than by the experts' counts | at {here()} | split dim 0 by "
                "the counts of all experts in order"
            )
        return tuple(self._run(x, of, e) for e in range(of.experts))

    def _run(self, x: T, of: Runs, expert: int) -> T:
        of.rows = x
        return torch.ops.tedfx.expert_run(x, of.counts, expert, of.size(expert))

    def _join(self, parts: list) -> T | None:
        """The runs of all experts, one after the other; None where these are not."""
        for of in self.runs.values():
            sizes = [of.sizes.get(e) for e in range(of.experts)]
            rows = of.rows
            if (
                rows is not None
                and len(parts) == of.experts
                and all(
                    size is not None and isinstance(part, T) and _same(part.shape[0], size)
                    for part, size in zip(parts, sizes)
                )
            ):
                return torch.ops.tedfx.join_runs(parts, rows)
        return None


def _same(a: Any, b: Any) -> bool:
    return all(isinstance(x, torch.SymInt) for x in (a, b)) and a.node.expr == b.node.expr

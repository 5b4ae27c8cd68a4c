"""Sorted rows that Python cuts into the experts' runs, by counts read back to the host.

    counts = ids.flatten().bincount(minlength=E)
    for e, rows in enumerate(x[order // k].split(counts.tolist())):     <- sizes that are data
        parts.append(experts[e](rows))
    done = torch.cat(parts)

    ends = F.pad(counts.cumsum(0), (1, 0))                              <- or torch.cat((zeros(1), ..))
    for e in range(E):
        done[ends[e] : ends[e + 1]] = experts[e](rows[ends[e] : ends[e + 1]])

While the model is traced the numbers of such counts are `Count`s, sums of the counts of some experts, which
Python may add, compare with nothing and cut tensors with. A cut at one expert's run is `expert_run`, what is
concatenated from the runs of all experts, in order, or written at all of them, `join_runs`: operators that a
trace can hold, since they say whose rows they are. `passes/capture_sorted.py` proves that the counts are
those of the ids by which the rows were sorted, or refuses.

That an expert has rows is taken for granted, as in loops.py: the branch for one without must do nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch.overrides import TorchFunctionMode

from tedfx import _torch
from tedfx.errors import TraceError
from tedfx.frontends.hits import HitExperts
from tedfx.frontends.questions import here

__all__ = ["Count", "ExpertRuns"]

T = torch.Tensor
_LISTS = {T.__iter__, T.tolist, T.unbind, torch.unbind, T.numpy}
_ZEROS = {torch.zeros, torch.zeros_like, T.new_zeros}
_SAME = {T.to, T.cpu, T.long, T.int, T.contiguous, T.clone, T.detach}
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


@dataclass
class _Written:
    """Rows `x` of which the runs of some experts are written, at the line `where`."""

    x: T
    of: Runs
    where: str
    parts: dict[int, T] = field(default_factory=dict)


class ExpertRuns(TorchFunctionMode):
    """`hits`: which tensors are counts of experts' ids."""

    def __init__(self, hits: HitExperts, asked: Callable[[], bool]):
        super().__init__()
        self.hits, self.asked = hits, asked
        self.runs: dict[int, Runs] = {}
        self.zeros: dict[int, T] = {}  # by id, as below, and kept, so that an id stays one tensor's
        self.starts: dict[int, tuple[T, T]] = {}  # running sums behind a zero: and the sums
        self.edges: dict[int, tuple[T, Count]] = {}  # entries of counts and of running sums
        self.written: dict[int, _Written] = {}  # some experts' runs in them are written, and not yet all

    def __exit__(self, kind, error, trace):
        super().__exit__(kind, error, trace)
        if kind is None and self.written:
            where = next(iter(self.written.values())).where
            raise TraceError(
                f"the runs of some experts are written, and those of others are not | at {where} | write all "
                "of them, one after the other"
            )

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first: Any = args[0] if args else kwargs.get("input")
        if self.written:
            self._unread(function, args, kwargs)
        cut = args[1] if len(args) > 1 and isinstance(args[1], slice) else None
        if cut is not None and function in (T.__getitem__, T.__setitem__):
            cut = slice(self._edge(cut.start), self._edge(cut.stop), cut.step)
            if isinstance(cut.start, Count) or isinstance(cut.stop, Count):
                return (
                    self._slice(first, cut) if function is T.__getitem__ else self._write(first, cut, args[2])
                )
        if function is T.item and id(first) in self.edges:
            return self.edges[id(first)][1]
        if function is torch.ops.aten.slice and any(isinstance(x, Count) for x in args[2:4]):
            return self._slice(first, slice(*args[2:4]))  # what torch.export makes of an index
        if function in _LISTS and isinstance(first, T) and id(first) in self.starts:
            counts = self._from_zero(self.starts[id(first)][1])
            return iter(counts) if function is T.__iter__ else counts
        if function in _LISTS and isinstance(first, T) and id(first) in self.hits.loads:
            return self._numbers(function, first)
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
        out = function(*args, **kwargs)
        if isinstance(out, T):
            self._learn(function, first, args, kwargs, out)
        return out

    def _learn(self, function: Callable, first: Any, args: tuple, kwargs: dict, out: T) -> None:
        """Remember zeros, running sums behind a zero, and entries of them."""
        if function in _ZEROS:
            self.zeros[id(out)] = out
        elif function in _SAME and isinstance(first, T):
            if id(first) in self.starts:
                self.starts[id(out)] = (out, self.starts[id(first)][1])
            if id(first) in self.edges:
                self.edges[id(out)] = (out, self.edges[id(first)][1])
            if id(first) in self.zeros:
                self.zeros[id(out)] = out
        elif function in _CATS and isinstance(first, (tuple, list)) and len(first) == 2:
            zero, sums = first
            if id(zero) in self.zeros and tuple(zero.shape) == (1,) and self._is_sum(sums):
                self.starts[id(out)] = (out, sums)
        elif function is torch.nn.functional.pad and self._is_sum(first):
            given = dict(zip(("input", "pad", "mode", "value"), args)) | kwargs
            if list(given["pad"]) == [1, 0] and given.get("mode", "constant") == "constant":
                if not given.get("value"):
                    self.starts[id(out)] = (out, first)
        elif function is T.__getitem__ and isinstance(args[1], int) and isinstance(first, T):
            if id(first) in self.starts:
                numbers = self._from_zero(self.starts[id(first)][1])
            elif id(first) in self.hits.loads and self.hits.loads[id(first)][2]:
                numbers = self._counts(first)
            else:
                return
            self.edges[id(out)] = (out, numbers[args[1]])

    def _from_zero(self, sums: T) -> list[Count]:
        numbers = self._counts(sums)
        return [Count(numbers[0].runs, frozenset()), *numbers]

    def _is_sum(self, x: Any) -> TypeGuard[T]:
        return isinstance(x, T) and id(x) in self.hits.loads and self.hits.loads[id(x)][2]

    def _edge(self, edge: Any) -> Any:
        return self.edges[id(edge)][1] if id(edge) in self.edges else edge

    def _unread(self, function: Callable, args: tuple, kwargs: dict) -> None:
        """What is written run by run may be asked for its size, and is not read before the last one."""
        if function is T.__setitem__ or getattr(function, "__name__", "") in ("__get__", "size", "dim"):
            return
        if any(id(x) in self.written for x in _torch.pytree.tree_leaves((args, kwargs))):
            raise TraceError(
                f"rows are read before the runs of all experts are written | at {here()} | write all of them "
                "first"
            )

    def _write(self, x: T, cut: slice, value: Any) -> None:
        """`x[start:end] = value`; with the last run of all, the rows are those runs."""
        of, expert = self._expert(cut)
        found = self.written.setdefault(id(x), _Written(x, of, here()))
        size = of.sizes.get(expert) if expert is not None else None
        if (
            expert is None
            or size is None
            or expert in found.parts
            or found.of is not of
            or of.rows is None
            or not isinstance(value, T)
            or not (value.dim() == x.dim() and _same(value.shape[0], size))
            or not (_same(x.shape[0], of.rows.shape[0]) and x.shape[1:] == value.shape[1:])
        ):
            raise TraceError(
                "an expert's run is written otherwise than once, by what is computed of its rows "
                f"| at {here()} | write done[start:end] = expert(rows[start:end])"
            )
        found.parts[expert] = value
        if len(found.parts) == of.experts:
            parts = [found.parts[e] for e in range(of.experts)]
            # an export that failed on its way left some behind, of the same line
            self.written = {i: other for i, other in self.written.items() if other.where != found.where}
            x.copy_(torch.ops.tedfx.join_runs(parts, of.rows))

    def _counts(self, counts: T) -> list[Count]:
        experts, each, summed = self.hits.loads[id(counts)]
        of = self.runs.setdefault(id(each), Runs(each, experts, self.asked))
        return [Count(of, frozenset(range(e + 1)) if summed else frozenset({e})) for e in range(experts)]

    def _numbers(self, function: Callable, counts: T) -> Any:
        numbers = self._counts(counts)
        if function is T.numpy:
            import numpy

            array = numpy.empty(len(numbers), dtype=object)
            array[:] = numbers
            return array
        return (
            iter(numbers) if function is T.__iter__ else numbers if function is T.tolist else tuple(numbers)
        )

    def _slice(self, x: T, cut: slice) -> T:
        of, expert = self._expert(cut)
        return x if expert is None else self._run(x, of, expert)

    def _expert(self, cut: slice) -> tuple[Runs, int | None]:
        """Whose run is cut out of sorted rows; None where it is all of them."""
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
            return of, None
        (expert, *more) = sorted(stop - start) or [-1]
        if more or start != frozenset(range(expert)) or stop != start | {expert}:
            raise TraceError(
                f"rows of several experts, or of none, are cut out of sorted rows | at {here()} | cut one "
                "expert's run at a time: rows[start:start + counts[e]], in the order of the experts"
            )
        return of, expert

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

"""Plain loops over experts: what makes them traceable, without touching the model.

    for e, expert in enumerate(self.experts):
        token, slot = torch.where(ids == e)
        if token.numel() == 0: continue                 <- torch.export cannot answer this
        out.index_add_(0, token, expert(x[token]) * w[token, slot, None])

How many tokens an expert gets is data. While the model is traced, a question whether there are any is
answered "yes":

- `numel()`, `shape`, `size()`, `len()` of a result of `torch.where(cond)`, `nonzero` or `x[mask]`, or of
  anything with as many rows, in the test of an `if` (directly or by a name): the number of rows is stated to
  be positive;
- `any()` of a mask, `mask.sum()` and `bincount(..)[e]`, compared with 0 or used as a truth value, with or
  without `item()`.

Why that is sound: the branch that is not traced is the one for an expert without tokens. It must do nothing
(`continue`, `pass`, or no branch at all), which is checked in the model's source (questions.py), and the
form into which `passes/capture_loops.py` brings the loop adds nothing for an expert without rows. Every
answer is written into the trace's notes, with its line; `capture_loops` refuses a trace with an answer that
belongs to no captured loop.

A loop over *which* experts were hit (`for e in hit.nonzero()`) is traced over all of them (hits.py). Refused
here, with the line: any other loop over rows, as its length is data; `len()` of rows used otherwise than as
an emptiness test, since python's `len` must be a number.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tedfx import _torch
from tedfx._torch import pytree
from tedfx.errors import TraceError
from tedfx.frontends.hits import HitExperts
from tedfx.frontends.questions import check_neutral, here, loop_over_size, tests_of, user_frame
from tedfx.frontends.runs import ExpertRuns

__all__ = ["ExpertLoops", "NOTE"]

NOTE = "assumed that an expert has tokens"

T = torch.Tensor
_SEARCHES = {
    torch.where,
    T.where,
    torch.nonzero,
    T.nonzero,
    torch.argwhere,
    T.argwhere,
    T.__getitem__,
    torch.masked_select,
    T.masked_select,
    torch.unique,
    T.unique,
}
_SIZES = {T.numel, T.nelement, T.size, inspect.getattr_static(T, "shape").__get__, torch.numel}
_ANY = {torch.any, T.any}
_COUNTS = {torch.sum, T.sum, torch.count_nonzero, T.count_nonzero, torch.bincount, T.bincount}
# What is known of a count that is positive, compared with a number.
_POSITIVE = {
    ("eq", 0): False,
    ("ne", 0): True,
    ("gt", 0): True,
    ("ge", 0): True,
    ("lt", 0): False,
    ("le", 0): False,
    ("ge", 1): True,
    ("lt", 1): False,
}


class ExpertLoops:
    """Frontend for any model: it recognises no model, only questions about how many tokens there are."""

    name = "loops"
    number_inputs = ()
    memories = ()

    def applies(self, model: nn.Module) -> bool:
        return True

    @contextlib.contextmanager
    def prepare(self, model: nn.Module, notes: list[str]) -> Iterator[None]:
        with _NotEmpty(notes) as empty, HitExperts(notes) as hits, ExpertRuns(hits, empty.asked):
            yield

    def reference(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def captured(self, model: nn.Module) -> list[str]:
        return []


class _NotEmpty(TorchFunctionMode):
    """`rows`: size symbols that count what a search found. `known`: tensors whose truth value (or None: a
    positive count) is answered."""

    def __init__(self, notes: list[str]):
        super().__init__()
        self.notes = notes
        self.rows: set = set()
        self.known: dict[
            int, tuple[torch.Tensor, bool | None]
        ] = {}  # the tensor is kept, so that its id stays its own

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get("input")
        first = first if isinstance(first, T) else None
        known = self.known.get(id(first)) if first is not None else None
        whole = function in (T.__iter__, T.tolist, T.__len__) or (
            function in (T.unbind, torch.unbind) and (args[1] if len(args) > 1 else kwargs.get("dim", 0)) == 0
        )
        if whole and first is not None and first.dim() and _symbols(first.shape[0]) & self.rows:
            if function is T.__len__ and self.asked():
                return 1  # any positive number: the test only compares it with 0
            what = "len() of rows" if function is T.__len__ else "a python loop (or list) over rows"
            raise TraceError(
                f"{what} whose number is data | at {here()} | loop over all the experts instead of "
                "those that were hit (one without "
                "tokens adds nothing); use x.shape[0] for a size"
            )
        if function is T.__bool__ and known is not None and self.asked():
            return known[1] is None or known[1]

        out = function(*args, **kwargs)

        if function in _SEARCHES:
            old = {
                s
                for a in pytree.tree_leaves((args, kwargs))
                if isinstance(a, T)
                for n in a.shape
                for s in _symbols(n)
            }
            self.rows |= {
                s
                for a in pytree.tree_leaves(out)
                if isinstance(a, T)
                for n in a.shape
                for s in _symbols(n) - old
            }
        elif function in _SIZES:
            counts = [
                n for n in (out if isinstance(out, (tuple, list)) else (out,)) if _symbols(n) & self.rows
            ]
            if counts and self.asked():
                for count in counts:
                    _torch.check(count > 0, "an expert without tokens was not expected here")
        elif isinstance(out, T):
            self._learn(function, first, args, known, out)
        elif function is T.item and known is not None and self.asked():
            if known[1] is not None:
                return known[1]
            _torch.check(out > 0, "an expert without tokens was not expected here")
        if function is T.__getitem__ and isinstance(out, T) and known is not None:
            self.known[id(out)] = (out, known[1])
        return out

    def _learn(self, function, first: T | None, args: tuple, known: tuple | None, out: T) -> None:
        """Remember `out` where it says whether there are tokens, or how many."""
        name = getattr(function, "__name__", "").strip("_")
        if function in _ANY:
            self.known[id(out)] = (out, True)
        elif function in _COUNTS and (
            (first is not None and first.dtype == torch.bool) or name in ("bincount", "count_nonzero")
        ):
            self.known[id(out)] = (out, None)
        elif known is None:
            return
        elif name in ("to", "long", "int", "cpu", "detach"):
            self.known[id(out)] = (out, known[1])
        elif (
            known[1] is None and len(args) == 2 and isinstance(args[1], int) and (name, args[1]) in _POSITIVE
        ):
            self.known[id(out)] = (out, _POSITIVE[name, args[1]])
        elif name in ("logical_not", "invert", "bitwise_not") and known[1] is not None:
            self.known[id(out)] = (out, not known[1])

    def asked(self) -> bool:
        """Whether the model's line asks if there are tokens; if so the answer is noted, and its other branch
        must be neutral."""
        frame = user_frame()
        tests = tests_of(frame) if frame is not None else []
        if frame is None or not tests:
            return False
        if (loop := loop_over_size(frame)) is not None:
            raise TraceError(
                f"a Python loop over the batch or the sequence ({loop}) that asks how many values it finds "
                f"| at {here()} | compute all of them at once, with masks in place of tests"
            )
        for test, asked in tests:
            check_neutral(test, asked, here())
        # the frames that the graph's nodes remember
        while frame.f_back is not None and frame.f_code.co_name != "forward":
            frame = frame.f_back
        lines = [line for _, _, line in frame.f_code.co_lines() if line is not None]
        note = f"{NOTE}: {here()} (in {frame.f_code.co_filename}:{sorted(lines)[0]}-{sorted(lines)[-1]})"
        if note not in self.notes:
            self.notes.append(note)
        return True


def _symbols(size: object) -> set:
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()

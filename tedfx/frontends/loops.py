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
(`continue`, `pass`, or no branch at all), which is checked in the model's source, and the form into which
`passes/capture_loops.py` brings the loop adds nothing for an expert without rows. Every answer is written
into the trace's notes, with its line; `capture_loops` refuses a trace with an answer that belongs to no
captured loop.

Refused here, with the line: a loop over *which* experts were hit (`for e in hit.nonzero()`), as its length is
data; `len()` of rows used otherwise than as an emptiness test, since python's `len` must be a number.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import operator
import sys
import textwrap
from collections.abc import Iterator
from types import CodeType, FrameType

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tedfx import _torch
from tedfx._torch import pytree
from tedfx.errors import TraceError, is_machinery

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
_SIZES = {T.numel, T.nelement, T.size, T.shape.__get__, torch.numel}
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
_AST_COMPARE = {
    "Eq": operator.eq,
    "NotEq": operator.ne,
    "Gt": operator.gt,
    "GtE": operator.ge,
    "Lt": operator.lt,
    "LtE": operator.le,
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
        with _NotEmpty(notes):
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
        first = args[0] if args and isinstance(args[0], T) else None
        known = self.known.get(id(first)) if first is not None else None
        whole = function in (T.__iter__, T.tolist, T.__len__) or (
            function in (T.unbind, torch.unbind) and (*args[1:], *kwargs.values(), 0)[0] == 0
        )
        if whole and first is not None and first.dim() and _symbols(first.shape[0]) & self.rows:
            if function is T.__len__ and self._asked():
                return 1  # any positive number: the test only compares it with 0
            what = "len() of rows" if function is T.__len__ else "a python loop (or list) over rows"
            raise TraceError(
                f"{what} whose number is data | at {_here()} | loop over all the experts instead of "
                "those that were hit (one without "
                "tokens adds nothing); use x.shape[0] for a size"
            )
        if function is T.__bool__ and known is not None and self._asked():
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
            if counts and self._asked():
                for count in counts:
                    _torch.check(count > 0, "an expert without tokens was not expected here")
        elif isinstance(out, T):
            self._learn(function, first, args, known, out)
        elif function is T.item and known is not None and self._asked():
            if known[1] is not None:
                return known[1]
            _torch.check(out > 0, "an expert without tokens was not expected here")
        if function is T.__getitem__ and known is not None:
            self.known[id(out)] = (out, known[1])
        return out

    def _learn(self, function, first: T | None, args: tuple, known: tuple | None, out: T) -> None:
        """Remember `out` where it says whether there are tokens, or how many."""
        name = getattr(function, "__name__", "").strip("_")
        if function in _ANY:
            self.known[id(out)] = (out, True)
        elif function in _COUNTS and (first.dtype == torch.bool or name in ("bincount", "count_nonzero")):
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

    def _asked(self) -> bool:
        """Whether the model's line asks if there are tokens; if so the answer is noted, and its other branch
        must be neutral."""
        frame = _user_frame()
        question = _expression(frame) if frame is not None else None
        tests = _tests(question) if question is not None else []
        if not tests:
            return False
        for test, asked in tests:
            _check_neutral(test, asked, _here())
        while (
            frame.f_back is not None and frame.f_code.co_name != "forward"
        ):  # the frames that the graph's nodes remember
            frame = frame.f_back
        lines = [line for _, _, line in frame.f_code.co_lines() if line is not None]
        note = f"{NOTE}: {_here()} (in {frame.f_code.co_filename}:{sorted(lines)[0]}-{sorted(lines)[-1]})"
        if note not in self.notes:
            self.notes.append(note)
        return True


def _symbols(size) -> set:
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()


# --- the model's source: what a test guards -----------------------------------------------------------------


def _user_frame() -> FrameType | None:
    """The model's own frame that this question comes from; None where torch asks it itself while it exports,
    on nobody's behalf."""
    frame = sys._getframe(1)
    while frame is not None and is_machinery(frame.f_code.co_filename):
        if frame.f_globals.get("__name__") == "tedfx.trace.export":  # above it is whoever called tedfx
            return None
        frame = frame.f_back
    return frame


def _here() -> str:
    frame = _user_frame()
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "an unknown line"


def _expression(frame: FrameType) -> ast.expr | None:
    """The expression that a frame is evaluating; None where there is no source."""
    found = _source(frame.f_code).get(list(frame.f_code.co_positions())[frame.f_lasti // 2])
    if isinstance(
        found, ast.If
    ):  # where a truth value is asked for, python gives the position of the whole statement
        found = found.test
        while isinstance(found, ast.UnaryOp) and isinstance(found.op, ast.Not):
            found = found.operand
    return found


@functools.lru_cache(maxsize=512)
def _source(code: CodeType) -> dict[tuple, ast.expr | ast.If]:
    """Position -> node of the source of a function; every node knows the one above it."""
    try:
        lines, start = inspect.getsourcelines(code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError, TypeError):
        return {}
    indent = len(lines[0]) - len(lines[0].lstrip())
    start = max(start, 1) - 1
    found: dict[tuple, ast.expr | ast.If] = {}
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            child.above = node
        if isinstance(node, (ast.expr, ast.If)):
            found[
                node.lineno + start,
                node.end_lineno + start,
                node.col_offset + indent,
                node.end_col_offset + indent,
            ] = node
    return found


def _tests(question: ast.expr) -> list[tuple[ast.If | ast.IfExp, list[ast.expr]]]:
    """Every `if` whose test holds `question`, or a name that stands for it, and where in the test it
    stands."""
    node = question
    while isinstance(node.above, ast.expr) and not isinstance(node.above, ast.IfExp):
        node = node.above
    if isinstance(node.above, (ast.If, ast.IfExp)) and node.above.test is node:
        return [(node.above, [question])]
    if isinstance(node.above, ast.Assign):
        names = {n.id for target in node.above.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
        top = node.above
        while hasattr(top, "above"):
            top = top.above
        ifs = [n for n in ast.walk(top) if isinstance(n, (ast.If, ast.IfExp))]
        asked = [(i, [n for n in ast.walk(i.test) if isinstance(n, ast.Name) and n.id in names]) for i in ifs]
        return [(test, where) for test, where in asked if where]
    return []


def _check_neutral(test: ast.If | ast.IfExp, asked: list[ast.expr], where: str) -> None:
    """The branch of `test` for an expert without tokens must do nothing."""
    empty, some = (_truth(test.test, asked, count) for count in (0, 1))
    if empty is None or some is None:
        raise TraceError(
            f"a test for tokens mixed with others ({ast.unparse(test.test)}) | at {where} | test for "
            "tokens alone"
        )
    if empty == some:
        return
    if isinstance(test, ast.IfExp):
        raise TraceError(
            f"an expression that depends on whether an expert has tokens | at {where} | drop the condition"
        )
    for statement in test.body if empty else test.orelse:
        if not isinstance(statement, (ast.Continue, ast.Pass)):
            raise TraceError(
                "an expert without tokens does something of its own "
                f"({ast.unparse(statement).splitlines()[0]}) | at {where} | let it do "
                "nothing: `continue`, or no test at all"
            )


def _truth(test: ast.expr, asked: list[ast.expr], count: int) -> bool | None:
    """A test's value where the number of tokens is `count`; None where the test says more."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        value = _truth(test.operand, asked, count)
        return None if value is None else not value
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and type(test.ops[0]).__name__ in _AST_COMPARE:
        left, right = (
            s.value if isinstance(s, ast.Constant) else _value(s, asked, count)
            for s in (test.left, test.comparators[0])
        )
        return (
            None
            if left is None or right is None
            else bool(_AST_COMPARE[type(test.ops[0]).__name__](left, right))
        )
    value = _value(test, asked, count)
    return None if value is None else bool(value)


def _value(side: ast.expr, asked: list[ast.expr], count: int) -> int | None:
    """`count`, for an expression that is only about the tokens (`x.shape[0]`, `mask.sum().item()`, `(mask ==
    1).any()`)."""
    if isinstance(side, (ast.BoolOp, ast.BinOp)):
        return None
    about = any(node is a for node in ast.walk(side) for a in asked) or any(
        node is side for a in asked for node in ast.walk(a)
    )
    return count if about else None

"""What a question in the model's source guards: the tests that depend on an expression being evaluated,
and whether the branch for an expert without tokens does nothing (loops.py)."""

from __future__ import annotations

import ast
import functools
import inspect
import operator
import sys
import textwrap
from dataclasses import dataclass, field
from types import CodeType, FrameType

import torch

from tedfx.errors import TraceError, is_machinery

__all__ = ["check_neutral", "here", "loop_over_size", "tests_of", "user_frame"]

_AST_COMPARE = {
    "Eq": operator.eq,
    "NotEq": operator.ne,
    "Gt": operator.gt,
    "GtE": operator.ge,
    "Lt": operator.lt,
    "LtE": operator.le,
}


def user_frame() -> FrameType | None:
    """The model's own frame that this question comes from; None where torch asks it itself while it exports,
    on nobody's behalf."""
    frame = sys._getframe(1)
    while frame is not None and is_machinery(frame.f_code.co_filename):
        if frame.f_globals.get("__name__") == "tedfx.trace.export":  # above it is whoever called tedfx
            return None
        frame = frame.f_back
    return frame


def here() -> str:
    frame = user_frame()
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "an unknown line"


@dataclass(frozen=True)
class _Source:
    """The source of a function: its expressions and `if`s by position, and of every node the one above."""

    at: dict[tuple[int | None, ...], ast.expr | ast.If] = field(default_factory=dict)
    above: dict[ast.AST, ast.AST] = field(default_factory=dict)


def _expression(frame: FrameType, source: _Source) -> ast.expr | None:
    """The expression that a frame is evaluating; None where there is no source."""
    found = source.at.get(list(frame.f_code.co_positions())[frame.f_lasti // 2])
    if isinstance(found, ast.If):
        # where a truth value is asked for, python gives the position of the whole statement
        found = found.test
        while isinstance(found, ast.UnaryOp) and isinstance(found.op, ast.Not):
            found = found.operand
    return found


@functools.lru_cache(maxsize=512)
def _source(code: CodeType) -> _Source:
    """Empty where there is none to be found."""
    try:
        lines, start = inspect.getsourcelines(code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError, TypeError):
        return _Source()
    indent = len(lines[0]) - len(lines[0].lstrip())
    start = max(start, 1) - 1
    found = _Source()
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            found.above[child] = node
        if isinstance(node, (ast.expr, ast.If)):
            last, end = node.end_lineno or node.lineno, node.end_col_offset or 0
            position = (node.lineno + start, last + start, node.col_offset + indent, end + indent)
            found.at[position] = node
    return found


def tests_of(frame: FrameType) -> list[tuple[ast.If | ast.IfExp, list[ast.expr]]]:
    """Every `if` whose test holds what a frame is evaluating, or a name that stands for it, and where in the
    test it stands."""
    source = _source(frame.f_code)
    question = _expression(frame, source)
    if question is None:
        return []
    node, above = question, source.above.get(question)
    while isinstance(above, ast.expr) and not isinstance(above, ast.IfExp):
        node, above = above, source.above.get(above)
    if isinstance(above, (ast.If, ast.IfExp)) and above.test is node:
        return [(above, [question])]
    if not isinstance(above, ast.Assign):
        return []
    names = {n.id for target in above.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    top: ast.AST = above
    while top in source.above:
        top = source.above[top]
    found: list[tuple[ast.If | ast.IfExp, list[ast.expr]]] = []
    for test in ast.walk(top):
        if isinstance(test, (ast.If, ast.IfExp)):
            walk = ast.walk(test.test)
            where: list[ast.expr] = [n for n in walk if isinstance(n, ast.Name) and n.id in names]
            found += [(test, where)] if where else []
    return found


def loop_over_size(frame: FrameType) -> str | None:
    """The loop around what a frame is evaluating that counts to a size of the inputs (`for t in range(n)`):
    one over tokens then, and not over experts."""
    source = _source(frame.f_code)
    node: ast.AST | None = _expression(frame, source)
    while node is not None:
        if isinstance(node, ast.For) and isinstance(node.iter, ast.Call):
            named = [frame.f_locals.get(n.id) for n in ast.walk(node.iter) if isinstance(n, ast.Name)]
            counted = ast.unparse(node.iter)
            if ".shape" in counted or ".size(" in counted:
                named += [size for x in named if isinstance(x, torch.Tensor) for size in x.shape]
            if any(isinstance(x, torch.SymInt) for x in named):
                return f"for {ast.unparse(node.target)} in {counted}"
        node = source.above.get(node)
    return None


def check_neutral(test: ast.If | ast.IfExp, asked: list[ast.expr], where: str) -> None:
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

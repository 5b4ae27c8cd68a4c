"""Sees every operator of a Function's body while it is traced, and refuses, with the line: a tensor that is
not among the arguments (a module's weight: its gradient would come from nowhere), a draw, a write into an
argument or a cotangent."""

from __future__ import annotations

import traceback
from typing import Any, NoReturn

import torch
from torch import Tensor

from tedfx._torch import TorchDispatchMode, pytree, written
from tedfx.errors import TraceError, line_of_definition, model_frames
from tedfx.ops.function import Kept

aten = torch.ops.aten
_CONSTANTS = (aten.lift_fresh.default, aten.lift_fresh_copy.default, aten._to_copy.default)


class Watch(TorchDispatchMode):
    """Of the body of `kept`, whose call stands at `line`. part: the method that runs."""

    def __init__(self, kept: Kept, line: str):
        super().__init__()
        self.kept, self.call, self.part = kept, line, "forward"
        self.known: dict[int, Tensor] = {}
        self.memory: set = set()
        self.given: set = set()

    def over(self, tensors: list[Tensor]) -> Watch:
        self.known = {id(x): x for x in tensors}
        self.given = {_memory(x) for x in tensors}
        self.memory = set(self.given)
        return self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.refuse(f"draws random numbers ({func})", "draw outside of it and hand it the result")
        for x in pytree.tree_leaves((args, kwargs)):
            if (
                isinstance(x, Tensor)
                and id(x) not in self.known
                and _memory(x) not in self.memory
                and func not in _CONSTANTS
            ):
                self.refuse(
                    f"reads a tensor {tuple(x.shape)} that is not among its arguments",
                    "hand it to apply, so that its gradient has a place",
                )
        for x in written(func, args, kwargs):
            for each in pytree.tree_leaves(x):
                if isinstance(each, Tensor) and _memory(each) in self.given:
                    self.refuse(
                        "writes into "
                        f"{'an argument' if self.part == 'forward' else 'a tensor that it was given'} "
                        f"({func})",
                        "make a new tensor instead",
                    )
        out = func(*args, **kwargs)
        for x in pytree.tree_leaves(out):
            if isinstance(x, Tensor):
                self.known[id(x)] = x
                self.memory.add(_memory(x))
        return out

    def refuse(self, what: str, instead: str) -> NoReturn:
        frames = traceback.extract_stack()
        while frames[-1].filename == __file__:  # this one, and that which asked for it
            frames.pop()
        inside = model_frames(frames, __file__)  # none where the engine runs backward on a thread of its own
        where = (
            f"{inside[-1].filename}:{inside[-1].lineno}"
            if inside
            else line_of_definition(getattr(self.kept.function, self.part))
        )
        raise TraceError(f"{self.kept.name}.{self.part} {what} | at {where} | {instead}")


def _memory(x: Tensor) -> Any:
    return x.untyped_storage()._cdata

"""Loops over the experts that were hit: while the model is traced, all of them are.

    hit = (one_hot(ids, E).sum((0, 1)) > 0).nonzero()        which experts have tokens: data
    for e in hit:                                              <- torch.export cannot know how often
        token, slot = torch.where(ids == e[0])
        out.index_add_(0, token, experts[e[0]](x[token]) * w[token, slot, None])

What such a search finds (`nonzero`, `where`, `argwhere` of a mask with an entry per expert, `unique` of
expert ids) is remembered. Where Python asks for it number by number (`for`, `tolist`, `numpy`, `unbind`), it
is all the numbers, 0 to E-1, and an entry of it is that number: `experts[e]`, `mask[e]`, `ids == e`.

Why that is sound: an expert without tokens adds nothing, as in a loop over all experts (loops.py), if those
that are not hit have no tokens. This must be proven, so `hit_experts(mask)` stays in the graph until
`passes/capture_loops.py` has proven the mask to say just that, of the routing whose loop it captured
(tedfx/capture/loads.py), and a trace in which it cannot is refused. What else a loop does for an expert that
was hit (a count in Python, say) shows in the capture check, which then also runs on tokens that are all alike
and so leave experts without any.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tedfx._torch import outside_of_trace, pytree
from tedfx.frontends.questions import here

__all__ = ["HIT", "HitExperts"]

HIT = "assumed that every expert was hit"

T = torch.Tensor
_SEARCHES = {torch.where, T.where, torch.nonzero, T.nonzero, torch.argwhere, T.argwhere}
_UNIQUE = {torch.unique, T.unique}
_CHOICES = {torch.topk: -1, T.topk: -1, torch.sort: -1, T.sort: -1, torch.max: None, T.max: None}
_BESTS = {torch.argmax: None, T.argmax: None, torch.argsort: -1, T.argsort: -1}
# Of these a result holds the same numbers, or some of them.
_LAYOUTS = {
    *(getattr(T, name) for name in ("__getitem__", "view", "reshape", "flatten", "squeeze", "unsqueeze")),
    *(getattr(T, name) for name in ("to", "cpu", "long", "int", "detach", "contiguous", "select", "clone")),
    *(getattr(torch, name) for name in ("reshape", "flatten", "squeeze", "unsqueeze", "select", "clone")),
}
_KEEPS = ("to", "cpu", "long", "int", "detach", "tolist", "contiguous", "clone", "flatten", "view", "reshape")
_COUNTS = {
    *(
        "one_hot",
        "scatter",
        "scatter_",
        "scatter_add",
        "scatter_add_",
        "index_add",
        "index_add_",
        "eq",
        "__eq__",
    ),
    *(
        "sum",
        "permute",
        "t",
        "transpose",
        "bincount",
        "histc",
        "cumsum",
        "float",
        "type",
        "ones_like",
        *_KEEPS,
    ),
}
_LISTS = {T.__iter__, T.tolist, T.unbind, torch.unbind, T.numpy}
_COMPARED = {
    *(getattr(T, name) for name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "bool")),
    *(getattr(of, name) for of in (T, torch) for name in ("gt", "ge", "ne", "greater", "not_equal", "eq")),
}


class HitExperts(TorchFunctionMode):
    """What is known of tensors, by id; the tensors are kept, so that their ids stay their own.

    ranges   ids of experts, and how many experts there are
    about    what is computed from them: one_hot, sums of it, ..
    loads    (how many experts, the counts, whether it is their running sum): an entry per expert
    found    (a tensor of experts that were hit, the numbers that it holds if all were, the mask that says
             which; None of a number)
    """

    def __init__(self, notes: list[str]):
        super().__init__()
        self.notes = notes
        self.ranges: dict[int, tuple[T, int]] = {}
        self.about: dict[int, tuple[T, int]] = {}
        self.loads: dict[int, tuple[int, T, bool]] = {}
        self.kept: list[T] = []
        self.found: dict[int, tuple[T, T, T | None]] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        mine = [self.found[id(x)] for x in leaves if id(x) in self.found]
        if not mine:
            out = function(*args, **kwargs)
            self._learn(function, args, kwargs, out)
            return out
        numbers = all(mask is None for _, _, mask in mine)
        only = not any(isinstance(x, T) and id(x) not in self.found for x in leaves)
        if only and numbers:
            return self._computed(function, args, kwargs)
        if function in _LISTS:
            self._assume(mine[0][2])
            return self._computed(function, args, kwargs)
        if numbers:
            return function(*pytree.tree_map(self._number, args), **pytree.tree_map(self._number, kwargs))
        out = function(*args, **kwargs)
        if only and function in _LAYOUTS and isinstance(out, T):
            held = pytree.tree_map(self._held, (args, kwargs))
            with outside_of_trace():
                self.found[id(out)] = (out, function(*held[0], **held[1]), mine[0][2])
        return out

    def _held(self, x: Any) -> Any:
        return self.found[id(x)][1] if id(x) in self.found else x

    def _computed(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """The function of numbers alone is a number, or numbers."""
        args, kwargs = pytree.tree_map(self._held, (args, kwargs))
        with outside_of_trace():
            out = function(*args, **kwargs)
            out = (
                tuple(out)
                if function in _LISTS and function is not T.numpy and not isinstance(out, list)
                else out
            )
            if isinstance(out, T) and out.dtype == torch.bool and out.dim() == 0:
                return bool(out)  # asked of the expert's number, in Python
        for value in pytree.tree_leaves(out):
            if isinstance(value, T):
                self.found[id(value)] = (value, value, None)
        return iter(out) if function is T.__iter__ else out

    def _number(self, x: Any) -> Any:
        """What an expert's number is where it meets other tensors: an int; a slice, as an index of one."""
        if id(x) not in self.found:
            return x
        value = self.found[id(x)][1]
        with outside_of_trace():
            number = int(value) if value.numel() == 1 else None
        if number is None:
            return value
        return number if value.dim() == 0 else slice(number, number + 1)

    def _count(self, function: Callable, args: tuple, kwargs: dict, out: T) -> None:
        """What is computed from experts' ids with an entry per expert may count them."""
        about = [
            experts
            for x in pytree.tree_leaves((args, kwargs))
            for found in (self.ranges.get(id(x)), self.about.get(id(x)))
            if found is not None
            for experts in [found[1]]
        ]
        if not about:
            return
        self.about[id(out)] = (out, about[0])
        if function.__name__ == "cumsum":
            source = args[0] if args else kwargs["input"]
            if id(source) in self.loads and not self.loads[id(source)][2]:
                self.loads[id(out)] = (*self.loads[id(source)][:2], True)
            return
        entries = out.shape[0] if out.dim() == 1 else 0
        if entries == about[0] if isinstance(entries, int) else function.__name__ in ("bincount", *_KEEPS):
            same = self.loads.get(id(args[0])) if args and function.__name__ in _KEEPS else None
            self.loads[id(out)] = same or (about[0], out, False)
            self.kept.append(out)

    def _assume(self, mask: T | None) -> None:
        if mask is None:
            return
        with torch.no_grad():
            torch.ops.tedfx.hit_experts(mask)
        note = f"{HIT}: {here()}"
        if note not in self.notes:
            self.notes.append(note)

    def _learn(self, function: Callable, args: tuple, kwargs: dict, out: Any) -> None:
        """Remember ids of experts, counts of them, and searches for those that were hit."""
        first = args[0] if args else kwargs.get("input")
        if not isinstance(first, T):
            return
        if getattr(function, "__name__", "") in _COUNTS and isinstance(out, T):
            self._count(function, args, kwargs, out)
        if function in _CHOICES or function in _BESTS:
            position = 2 if getattr(function, "__name__", "") == "topk" else 1
            dim = kwargs.get(
                "dim", args[position] if len(args) > position else {**_CHOICES, **_BESTS}[function]
            )
            ids = out if isinstance(out, T) else out[1] if isinstance(out, tuple) and len(out) == 2 else None
            if ids is not None and isinstance(dim, int) and first.dim() and isinstance(first.shape[dim], int):
                self.ranges[id(ids)] = (ids, first.shape[dim])
        elif function in _LAYOUTS and isinstance(out, T) and id(first) in self.ranges:
            self.ranges[id(out)] = (out, self.ranges[id(first)][1])
        elif function in _UNIQUE and isinstance(out, T) and id(first) in self.ranges:
            with outside_of_trace():
                every = torch.arange(self.ranges[id(first)][1])
            self.found[id(out)] = (out, every, first)
        elif function in _COMPARED and isinstance(out, T) and id(first) in self.about:
            self.about[id(out)] = (out, self.about[id(first)][1])
        elif function in _SEARCHES and len(args) + ("input" in kwargs) == 1 and first.dim() == 1:
            experts = self.about[id(first)][1] if id(first) in self.about else first.shape[0]
            if not isinstance(experts, int) or experts < 2:
                return
            with outside_of_trace():
                every = torch.arange(experts)
                values = (every,) if isinstance(out, tuple) else (every.unsqueeze(1),)
            for value, numbers in zip(out if isinstance(out, tuple) else (out,), values):
                self.found[id(value)] = (value, numbers, first)

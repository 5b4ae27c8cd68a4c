"""What a traced forward does beside its operators: buffers that it assigns, attributes that it changes,
generators that it moves.

torch.export records operators on tensors. Of a call of the model it drops whatever Python does on the side;
the next call, or the next step, would then be another one on a single device than in the graph. So while the
model is traced its call is watched:

1. **Buffers.** A new tensor in the place of a buffer (`self.bias = self.bias + ..`) becomes a write to the
   buffer at the end of the call, so that the graph has it.
2. **Attributes, globals, closures** (`tedfx/trace/held.py`) are compared with what they were and put back.
   What differs must be
   - a value that the call set before it read it, and read again: it is passed from one part of the model to
     another, and no call sees another's; or
   - a memory of what does not change (a cached property): traced once more from there, the call gives the
     same graph and changes nothing. Then all calls after it do.
   Anything else is refused by its name.
3. **Generators** (`tedfx/trace/draws.py`) that moved are put back and refused, with the line that drew.

The model is as it was, also when it is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from tedfx._torch import MODULE_ATTRIBUTES, around_call, pytree
from tedfx.errors import TraceError
from tedfx.trace.draws import Draws
from tedfx.trace.held import Change, Snapshot
from tedfx.trace.named import MISSING
from tedfx.trace.reads import Place, Reads, observed
from tedfx.trace.values import is_scalar

T = TypeVar("T")


class Observation:
    """Of the calls of `model` while `watching` is open."""

    def __init__(self, model: nn.Module):
        self.model, self.reads = model, Reads()
        self.changes: list[Change] = []  # of the last call
        self._start: list[Change] = []  # what the next call starts from
        self._hooks: list[dict] = []  # after the last call
        self._steady: set[tuple[int, str]] = set()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        with self.reads.recording(), around_call(self.model, self._call):
            yield

    def _call(self, call: Callable[[], Any]) -> Any:
        before, draws, tables = Snapshot(self.model), Draws(self.model), _Tables(self.model)
        for change in self._start:
            change.put()
        if self._start:
            tables.put_hooks(self._hooks)
        start = Snapshot(self.model) if self._start else before
        try:
            self.reads.active = True
            try:
                out = call()
            finally:
                self.reads.active = False
            tables.check()
            self.changes, self._hooks = start.changes(), tables.hooks()
            moved = draws.moved()
            if moved is not None:
                before.restore()
                draws.restore()
                tables.restore()
                raise TraceError(
                    f"forward draws from {moved} | at {draws.line(call)} | a graph has the draw of its "
                    "trace in every call: draw with a torch operator on a tensor (torch.rand, "
                    "dropout), or draw outside and pass it as an argument"
                )
            tables.write()
            return out
        finally:
            tables.restore()
            before.restore()
            draws.restore()

    def remember(self, names: Sequence[str]) -> None:
        """Attributes of modules that calls read, and that are no input: memories of a library."""
        self._steady |= {(id(vars(m)), name) for m in self.model.modules() for name in names}

    def settle(self, first: str, graph: Callable[[], str]) -> None:
        """Refuse what the last call changed, unless it is of no consequence. `first` is its graph as text;
        `graph` traces the call again and gives that one's."""
        changes = [change for change in self.changes if not self._passed(change)]
        if not changes:
            return
        for change in changes:
            if (
                change.table
                and isinstance(change.key, str)
                and self.reads.stash(change.table, change.key) is False
            ):
                raise TraceError(
                    f"forward leaves a value in {change.path} that it does not read itself | attribute "
                    f"{change.path} | what reads it outside would see an old one: return it from forward"
                )
        for change in changes:
            if _bound_to_the_trace(change.new) or change.old is MISSING and type(change.new) is object:
                raise _state(change)
        self._start = [c for c in self.changes if not _bound_to_the_trace(c.new)]
        try:
            second = graph()
            again = [change for change in self.changes if not self._passed(change)]
        finally:
            self._start = []
        if again or first != second:
            raise _state((again or changes)[0])
        self._steady |= {(change.table, change.key) for change in changes}

    def _passed(self, change: Change) -> bool:
        """Whether it is set before it is read, in every call, and read in that call."""
        return (
            bool(change.table)
            and isinstance(change.key, str)
            and self.reads.stash(change.table, change.key) is True
        )

    def observed(self) -> dict[Place, Any]:
        """What the calls read, and its values; to be asked when the model is as the user has it."""
        return observed(self.model, self.reads, self._steady)


def _bound_to_the_trace(value: Any) -> bool:
    """Whether a value is a tensor or a size of the trace, or has one."""
    return any(
        isinstance(leaf, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool))
        for leaf in pytree.tree_leaves(value)
        if not is_scalar(leaf)
    )


def _state(change: Change) -> TraceError:
    return TraceError(
        f"forward changes {change.path}, which the next call would see and a graph does not | attribute "
        f"{change.path} | make it a buffer that is updated in place (register_buffer, "
        "self.step.add_(1)), or pass it as an argument"
    )


class _Tables:
    """Parameters, buffers and submodules as they were, and what the call put in their place."""

    def __init__(self, model: nn.Module):
        self._modules = [
            (name, m, dict(m._parameters), dict(m._buffers), dict(m._modules))
            for name, m in model.named_modules()
        ]
        # Hooks that a first call installs (transformers' capture of outputs): with the flag that says so put
        # back, they would be installed twice.
        hooks = MODULE_ATTRIBUTES - {"_parameters", "_buffers", "_modules"}
        self._hooks = [
            (table, dict(table))
            for m in model.modules()
            for key in hooks
            if isinstance(table := vars(m).get(key), dict)
        ]
        self._assigned: list[tuple[torch.Tensor, torch.Tensor]] = []

    def check(self) -> None:
        """Refuse what is no new value of a buffer."""
        self._assigned = []
        for name, module, parameters, buffers, modules in self._modules:
            prefix = f"{name}." if name else ""
            _same(prefix, "parameter", parameters, module._parameters)
            _same(prefix, "submodule", modules, module._modules)
            for key in _differing(buffers, module._buffers):
                if key not in buffers or key not in module._buffers:
                    raise _changed(prefix + key, "buffer", buffers, module._buffers)
                self._new_value(prefix + key, buffers[key], module._buffers[key])

    def _new_value(self, path: str, old: torch.Tensor | None, new: torch.Tensor | None) -> None:
        if old is None or new is None:
            raise TraceError(
                f"forward {'sets' if old is None else 'drops'} the buffer {path}, which is "
                f"{'None' if old is None else 'a tensor'} before | buffer {path} | give it a tensor in "
                "__init__ and write to it"
            )
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise TraceError(
                f"forward assigns {_kind(new)} to the buffer {path}, which is {_kind(old)} | buffer "
                f"{path} | a buffer keeps its shape and dtype from step to step: assign the same"
            )
        if new.requires_grad:
            raise TraceError(
                f"forward assigns a value that has a gradient to the buffer {path} | buffer {path} | "
                "the next backward would run through this one: detach() it, or assign under no_grad"
            )
        self._assigned.append((old, new))

    def write(self) -> None:
        """Assigned values, as writes to the buffers. Each is read before one is written: they may be each
        other's."""
        values = [(old, new.clone()) for old, new in self._assigned]
        for old, new in values:
            old.copy_(new)

    def hooks(self) -> list[dict]:
        return [dict(table) for table, _ in self._hooks]

    def put_hooks(self, hooks: list[dict]) -> None:
        for (table, _), its in zip(self._hooks, hooks):
            if table != its:
                table.clear()
                table.update(its)

    def restore(self) -> None:
        self.put_hooks([saved for _, saved in self._hooks])
        for _, module, parameters, buffers, modules in self._modules:
            _put_back(module._parameters, parameters)
            _put_back(module._buffers, buffers)
            _put_back(module._modules, modules)


def _differing(old: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    return [key for key in dict.fromkeys((*old, *now)) if old.get(key) is not now.get(key)]


def _same(prefix: str, kind: str, old: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Refuse any difference."""
    for key in _differing(old, now):
        raise _changed(prefix + key, kind, old, now)


def _changed(path: str, kind: str, old: Mapping[str, object], now: Mapping[str, object]) -> TraceError:
    key = path.rpartition(".")[2]
    what = "registers" if key not in old else "removes" if key not in now else "replaces"
    return TraceError(
        f"forward {what} the {kind} {path} | {kind} {path} | do it before "
        "parallelize; values of parameters and buffers change in place"
    )


def _put_back(table: dict[str, T], saved: Mapping[str, T]) -> None:
    if list(table) != list(saved) or any(table[k] is not saved[k] for k in saved):
        table.clear()
        table.update(saved)


def _kind(x: torch.Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"


@contextlib.contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """What runs under it leaves the model as it was: attributes, tables, generators that it holds. Values of
    tensors that are written in place are not kept."""
    before, tables = Snapshot(model), _Tables(model)
    try:
        yield
    finally:
        tables.restore()
        before.restore()


__all__ = ["Observation", "kept"]

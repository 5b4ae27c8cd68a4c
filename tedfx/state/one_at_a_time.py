"""A model's own initialisation, run on a model without storage: one tensor of it exists in full at a time.

The code that initialises is the model's, unchanged; it writes in place to parameters and buffers on the meta
device. `OneAtATime` sees every operator below autograd. A view of a meta tensor stays a view of nothing.
Anything else is run on real tensors on the CPU: the meta tensor (or view) stands for the same place in a full
tensor that is made when it is first touched. When an operator touches another one, the full tensor is handed
to `Slot.keep`, which takes this rank's share, and freed. A tensor that is touched again later is asked for
again, with `Slot.fetch`.

The operators are those that a single device would run, in the same order, on tensors of the same strides, so
the random numbers and the values are the same bit by bit. The model's code is told that its tensors are on
the CPU (`OnCpu`): `torch.nn.init.orthogonal_`, for one, does nothing to a meta tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tedfx import _torch
from tedfx._torch import TorchDispatchMode, pytree
from tedfx.errors import ConfigError

# In-place operators after which nothing is left of what was there before.
_OVERWRITING = {
    "normal_",
    "uniform_",
    "fill_",
    "zero_",
    "copy_",
    "random_",
    "bernoulli_",
    "exponential_",
    "log_normal_",
    "cauchy_",
    "geometric_",
}
_WORDS = 2**31 - 1


@dataclass(eq=False)
class Slot:
    """One tensor on the meta device, and what becomes of its value.

    keep: takes the full value, on the CPU; None: the value is thrown away. fetch: the kept value again, in
    full. muted: writes are dropped, and its value is nowhere. whole: every element was given a value.
    """

    name: str
    meta: Tensor
    keep: Callable[[Tensor], object] | None = None
    fetch: Callable[[], Tensor] | None = None
    muted: bool = False
    kept: bool = False
    whole: bool = False
    full: Tensor | None = None


class OneAtATime(TorchDispatchMode):
    """Under it, operators on the meta tensors of `slots` run on full tensors that come and go."""

    def __init__(self, slots: list[Slot]):
        super().__init__()
        self._slots: dict[int, Slot] = {}
        self._live: list[Slot] = []
        self.checksum = 0  # of all values, in order: equal on ranks that drew the same
        for slot in slots:
            other = self._slots.setdefault(_torch.storage_key(slot.meta), slot)
            if other is not slot:
                raise ConfigError(
                    f"{other.name} and {slot.name} are different tensors of one storage: cannot "
                    "initialise them one at a time"
                )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if isinstance(kwargs.get("device"), torch.device) and kwargs["device"].type == "meta":
            kwargs["device"] = torch.device("cpu")
        touched = list(
            dict.fromkeys(s for x in pytree.tree_leaves((args, kwargs)) if (s := self._slot(x)) is not None)
        )
        if not touched or _torch.is_view(func):
            return func(*args, **kwargs)
        written = [x for x in _torch.written(func, args, kwargs) if isinstance(x, Tensor)]
        if any(slot.muted for slot in touched):
            return self._muted(func, args, kwargs, written)

        for slot in [s for s in self._live if s not in touched]:
            self.let_go(slot)
        whole = (
            _torch.op_name(func) in _OVERWRITING and len(touched) == 1 and _covers(args[0], touched[0].meta)
        )
        full = {slot: self._bring(slot, whole) if slot.full is None else slot.full for slot in touched}
        given: dict[int, Tensor] = {}

        def real(x):
            slot = self._slot(x)
            if slot is None:
                return x
            there = torch.empty(0, dtype=x.dtype).set_(
                full[slot].untyped_storage(), x.storage_offset(), x.shape, x.stride()
            )
            given[id(there)] = x
            return there

        operands = pytree.tree_map(real, (args, kwargs))
        result = func(*operands[0], **operands[1])
        for x in written:
            slot = self._slot(x)
            if slot is not None:
                slot.whole = slot.whole or whole or not slot.meta.is_floating_point()
        return pytree.tree_map(lambda y: given.get(id(y), y), result)

    def _slot(self, x) -> Slot | None:
        return self._slots.get(_torch.storage_key(x)) if isinstance(x, Tensor) else None

    def _muted(self, func, args, kwargs, written):
        if not written:
            return func(*args, **kwargs)  # what is computed from it has no value either
        if all((slot := self._slot(x)) is not None and slot.muted for x in written):
            return written[0] if len(written) == 1 else tuple(written)
        names = [s.name for x in pytree.tree_leaves((args, kwargs)) if (s := self._slot(x)) is not None]
        raise ConfigError(
            f"{' and '.join(dict.fromkeys(names))} are initialised together, but only some are to be: "
            "call init_weights() first"
        )

    def _bring(self, slot: Slot, overwritten: bool) -> Tensor:
        full = torch.empty_strided(slot.meta.shape, slot.meta.stride(), dtype=slot.meta.dtype)
        if slot.kept and not overwritten and slot.fetch is not None:
            full.copy_(slot.fetch())
        elif not overwritten and slot.meta.is_floating_point():
            full.fill_(float("nan"))  # so that what is never written to shows
        slot.full = full
        self._live.append(slot)
        return full

    def let_go(self, slot: Slot) -> None:
        self._live.remove(slot)
        full, slot.full = slot.full, None
        assert full is not None, slot.name  # as of all that are live
        self.receive(slot, full)

    def receive(self, slot: Slot, full: Tensor) -> None:
        """A full value for this slot, to be kept."""
        if slot.keep is None or slot.muted:
            return
        if not slot.whole and full.is_floating_point():
            slot.whole = not full.numel() or not bool(
                full.to(torch.float32).isnan().any() if full.element_size() == 1 else full.min().isnan()
            )
        slot.keep(full)
        slot.kept = True
        self.checksum = (self.checksum * 31 + _sum(full)) % _WORDS

    def finish(self) -> None:
        for slot in list(self._live):
            self.let_go(slot)


class OnCpu(TorchFunctionMode):
    """Under it, tensors on the meta device say that they are on the CPU."""

    _ANSWERS = {
        getattr(Tensor, name).__get__: answer
        for name, answer in {"is_meta": False, "is_cpu": True, "device": torch.device("cpu")}.items()
    }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return self._ANSWERS[func] if func in self._ANSWERS and args[0].is_meta else result


def _covers(x, meta: Tensor) -> bool:
    return (
        isinstance(x, Tensor)
        and x.dtype == meta.dtype
        and x.numel() == meta.numel()
        and (x.stride() == meta.stride() or (x.is_contiguous() and meta.is_contiguous()))
    )


def _sum(full: Tensor) -> int:
    flat = full.contiguous().reshape(-1)
    words = flat.view(torch.int32 if flat.numel() * flat.element_size() % 4 == 0 else torch.uint8)
    return (
        sum(int(part.sum(dtype=torch.int64)) for part in words.split(2**20)) % _WORDS
    )  # in parts: torch sums a converted copy

"""One-hot with as many classes as the data ask for, of which the first are taken.

    classes = max(places.max() + 1, capacity)                    a number that is data
    slots = F.one_hot(places, classes)[..., :capacity]             one_hot takes no place beyond its classes

Such a number is asked for in Python, where it must be a number. While the model is traced it stays the tensor
that it is, with what is known of it: it is larger than every entry of `places`, and no less than `capacity`.
One-hot with that many classes is then never too narrow, and its first `capacity` classes, or fewer, are what
they are for any number of classes that suffices. It is traced as `wide_one_hot`, of which
tedfx/trace/first_classes.py takes them; whatever else is read of it has a size that is data, and is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from tedfx.ops.one_hot import wide_one_hot

__all__ = ["WideOneHots"]

T = torch.Tensor
_ADD = {T.add, T.__add__, T.__radd__, torch.add}
_LARGEST = {T.max, torch.max, T.amax, torch.amax}


@dataclass(frozen=True)
class _Number:
    """max(of.max() + plus, least). itself: the tensor that is this number, kept so that its id stays its
    own."""

    itself: T
    of: T
    plus: int
    least: int | torch.SymInt | None = None


class WideOneHots(TorchFunctionMode):
    """numbers: what is known of tensors, by id."""

    def __init__(self):
        super().__init__()
        self.numbers: dict[int, _Number] = {}

    def larger(self, args: tuple) -> T | None:
        """`max` of one of these numbers and a size; None of anything else."""
        known = [x for x in map(self._number, args) if x is not None]
        sizes = [x for x in args if isinstance(x, (int, torch.SymInt))]
        if len(args) != 2 or len(known) != 1 or len(sizes) != 1 or known[0].least is not None:
            return None
        least = known[0].itself.new_full((), cast(int, sizes[0]))
        out = torch.maximum(known[0].itself, least)  # whatever else reads it
        self.numbers[id(out)] = replace(known[0], itself=out, least=sizes[0])
        return out

    def _number(self, x: object) -> _Number | None:
        return self.numbers.get(id(x))

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.one_hot:
            number = self._classes((*args, *kwargs.values()))
            if number is not None and number.least is not None:
                return wide_one_hot(number.of, number.least + 1)
        out = function(*args, **kwargs)
        if not isinstance(out, T) or kwargs:
            return out
        if function in _LARGEST and len(args) == 1 and not out.is_floating_point():
            self.numbers[id(out)] = _Number(out, args[0], 0)
        elif function in _ADD and type(args[1]) is int and args[1] >= 0:
            known = self._number(args[0])
            if known is not None and known.least is None:
                self.numbers[id(out)] = replace(known, itself=out, plus=known.plus + args[1])
        return out

    def _classes(self, given: tuple) -> _Number | None:
        """The number of classes of a one-hot, where it is one of these, and enough for every entry."""
        number = self._number(given[1]) if len(given) == 2 else None
        return number if number is not None and number.of is given[0] and number.plus > 0 else None

"""Whether a call fits what was traced: its sizes (`tedfx/trace/call_sizes.py`), and the integers that it
looks up (`tedfx/trace/call_values.py`). What a rank can see alone, before anything runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from tedfx.graph.signature import Path
from tedfx.ranks.call_check import checksums
from tedfx.trace.call_sizes import SizeCheck
from tedfx.trace.call_values import ranges


class CallRules:
    """What a call must satisfy by itself. Made from the trace before passes change its graph. ranks: how many
    have a part of the batch each.

    batch_inputs: paths of the inputs that are cut over the batch; shared_inputs: of the others with dims,
    where there are several parts.
    """

    def __init__(self, trace, ranks: int = 1):
        self._sizes = SizeCheck(trace, ranks)
        self.batch_inputs = self._sizes.batch_inputs
        self.shared_inputs = (
            frozenset(path for path, dims in self._sizes.inputs.items() if dims and ranks > 1)
            - self.batch_inputs
        )
        found = ranges(trace)
        self._values = [(r, r.path) for r in found if r.path is not None]
        self._positions = [r for r in found if r.path is None]
        self._reached: set[tuple] = set()

    @property
    def limits(self) -> dict[Path, int]:
        """How many values an integer input may have, where something looks it up."""
        found: dict[Path, int] = {}
        for each, path in self._values:
            found[path] = min(each.high + 1, found.get(path, each.high + 1))
        return found

    def check_sizes(self, given: Mapping[Path, Tensor]) -> None:
        """CallError for sizes that the trace does not hold for."""
        self._sizes(given)

    def check_values(
        self,
        calls: Sequence[Mapping[Path, Tensor]],
        tensors: Mapping[str, Tensor],
        shared: Collection[str],
        alone: bool,
    ) -> tuple[int, int] | None:
        """CallError where a call of these looks up what is not there; else the checksums of all `tensors`,
        None where they were not read.

        Smallest and largest values are read together with the checksums, in one copy to the host. A rank
        without others (alone) needs no checksums: there they are read on the CPU only, where that costs
        nothing.
        """
        for given in calls:
            self._check_positions(given)
        looked_up = [(r, given) for given in calls for r, path in self._values if given[path].numel()]
        if alone and any(t.device.type != "cpu" for t in tensors.values()):
            return None
        extremes = [value.to(torch.int64) for r, given in looked_up for value in r.extremes(given)]
        common, data, *found = checksums(tensors if not alone else {}, shared, extremes)
        for (r, given), low, high in zip(looked_up, found[::2], found[1::2]):
            if low < r.low or high > r.high:
                r.check(given)
        return common, data

    def _check_positions(self, given: Mapping[Path, Tensor]) -> None:
        shapes = tuple(given[path].shape for path in self._sizes.inputs)
        if shapes not in self._reached:
            for each in self._positions:
                each.check(given)
            self._reached.add(shapes)

"""Weights for a ParallelModule whose model has none: it was made on the meta device.

A rank holds its share of every parameter from the start, empty. `init_weights`, `load_pretrained`
(`tedfx/runtime/pretrained.py`) and `load_state_dict` fill it; before one of them has, whatever needs weights
is refused. Beside the share at most one tensor of the model is in memory in full, on the host: the one that
is initialised, converted or gathered.

All three methods are collectives over the mesh: every rank calls them with the same arguments. An error on
one rank is raised on all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tedfx.errors import ConfigError, TedfxError
from tedfx.ranks.failures import RankFailed, failure_line
from tedfx.runtime.held import Held
from tedfx.state.hf_folder import box_of
from tedfx.state.initialise import initialise
from tedfx.state.one_at_a_time import Slot
from tedfx.state.parameters import Placed

WAYS = "give it weights first: pm.init_weights(), pm.load_pretrained(folder) or pm.load_state_dict(state)"


Found = TypeVar("Found")
Row = tuple[str, Placed | None, tuple[str, ...]]
"""(parameter or buffer, its place, the user's names of one tensor in it: the first stands for all)"""


class NoWeights(TedfxError, RuntimeError):
    """The module was made on the meta device and has no weights yet."""


class Weights(Held):
    """Which tensors have values, and the model's own initialisation.

    origin: the user's model; absent: its tensors (tied ones by their first name) that have no values yet.
    """

    def __init__(self, *held, origin: nn.Module | None, absent: Iterable[str]):
        super().__init__(*held)
        self._origin = (origin,)  # in a tuple: it is no submodule of this one
        self._absent: set[str] = set(absent)
        self._conversions: list | None = None

    @property
    def has_weights(self) -> bool:
        """Whether every parameter and buffer has a value."""
        return not self._absent

    def require_weights(self, what: str) -> None:
        """NoWeights, in one line, for `what` needs weights and some have none."""
        if self._absent:
            raise NoWeights(
                f"{what}: {min(self._absent)} and {len(self._absent) - 1} more have no values, the "
                f"model was made on the meta device; {WAYS}"
            )

    def _fill_buffers(self) -> None:
        """Values for the buffers that no state dict holds (tables of positions), by the model's own
        initialisation."""
        wanted = self._absent & self._non_persistent
        if not wanted:
            return
        slots = self._slots(wanted)
        initialise(self._model(), slots, 0)
        left = sorted(slot.name for slot in slots if slot.name in wanted and not (slot.kept and slot.whole))
        if left:
            raise ConfigError(
                f"buffer {left[0]} is in no state dict and the model's own initialisation does not set "
                "it: call init_weights(init=..) before loading"
            )
        self._absent -= wanted

    def _model(self) -> nn.Module:
        if self._origin[0] is None:
            raise ConfigError(
                "this ParallelModule was not made by tedfx.parallelize: the user's model is not known"
            )
        return self._origin[0]

    def _names(self) -> list[Row]:
        """One for each tensor of the user's."""
        rows: list[Row] = []
        for name, placed in self._placed.items():
            rows.extend((name, placed, names) for names in placed.layout.groups)
        return rows + [(name, None, (name,)) for name in self.buffer_names()]

    # ---- initialisation ------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_weights(self, init: Callable[[nn.Module], None] | None = None, seed: int | None = None) -> None:
        """Run the model's own initialisation: bit by bit what it gives on a single device, on the CPU, from
        the same seed.

        init   a function of a module, applied as `model.apply(init)` does. Missing: a Hugging Face model's
               own; for other modules each submodule's `reset_parameters()`, in the order of
               `model.modules()`.
        seed   of torch's CPU generator; missing: the first rank's `torch.initial_seed()`. The first rank's
               counts. The generator of the process is left as it was.

        Each parameter is drawn in full on every rank, one at a time, and cut to this rank's share. Raises
        ConfigError where a parameter or a buffer is given no value, naming it; the module then still has no
        weights.
        """
        model = self._model()
        if not any(t.is_meta for t in (*model.parameters(), *model.buffers())):
            raise ConfigError(
                "init_weights is for a model made on the meta device; this one had weights, which the "
                "parallel module has"
            )
        seed = torch.initial_seed() if seed is None else int(seed)
        high, low = self._meeting.exchange([seed >> 32, seed & 0xFFFFFFFF], "init_weights")[
            self._meeting.ranks[0]
        ]
        slots, before = self._slots(), self._absent
        mine = {slot.name for slot in slots}
        self._absent = before | mine
        error, checksum = None, 0
        try:
            checksum = initialise(model, slots, (high << 32) | low, init)
            left = [slot.name for slot in slots if not (slot.kept and slot.whole)]
            if left:
                raise ConfigError(
                    f"nothing gives a value to {left[0]}"
                    + f" and {len(left) - 1} more" * (len(left) > 1)
                    + ": pass init_weights(init=..), a function of a module that sets all of its tensors "
                    "in place"
                )
        except Exception as raised:  # told to the other ranks, then raised
            error = raised
        sums = self._settle(error, "init_weights", checksum)
        if len(set(sums)) > 1:
            raise ConfigError(
                "init_weights: the ranks drew different values; draw from torch's own CPU generator "
                "only, alike on every rank"
            )
        self._absent = before - mine
        self._conversions = None

    def _slots(self, only: set[str] | None = None) -> list[Slot]:
        """A slot per tensor of the model on the meta device; those that are not in `only` are muted."""
        tensors = {
            **dict(self._model().named_buffers(remove_duplicate=False)),
            **dict(self._model().named_parameters(remove_duplicate=False)),
        }
        slots = []
        for name, placed, names in self._names():
            meta = tensors[names[0]]
            if not meta.is_meta:
                continue
            if placed is None:
                buffer = self.get_buffer(name)
                keep, fetch = buffer.copy_, buffer.cpu
            else:
                keep = lambda full, n=names[0], p=placed, local=self.local(name): p.kept.cut(n, full, local)
                fetch = lambda n=names[0], p=placed, name=name: self._whole(name, p, n).cpu()
            slots.append(Slot(names[0], meta, keep, fetch, muted=only is not None and names[0] not in only))
        return slots

    def _whole(self, name: str, placed: Placed, user_name: str, to_first: bool = False) -> Tensor:
        """The user's full tensor, on every rank (or of use on the first one only), bit by bit. A
        collective."""
        local, layout = self.local(name), placed.layout
        full = torch.zeros(layout.user_shape, dtype=local.dtype, device=local.device)
        mesh = placed.mesh
        if all(
            at == 0
            for axis, at in zip(mesh.mesh_dim_names, mesh.get_coordinate())
            if axis not in placed.kept.axes
        ):
            for offsets, where in placed.kept.chunks[user_name]:
                full[box_of(offsets, local[where].shape)] = local[where]
        if mesh.size() > 1 and full.numel():
            flat = full.reshape(-1)
            words = flat.view(
                torch.int32 if full.nbytes % 4 == 0 else torch.uint8
            )  # one contributor per element: a sum of words keeps its bits
            group = self._context.group(tuple(mesh.mesh_dim_names))
            if to_first:
                dist.reduce(words, self._meeting.ranks[0], group=group)
            else:
                dist.all_reduce(words, group=group)
        return full

    def _together(self, what: str, act: Callable[[], Found]) -> Found:
        """What `act` gives on this rank, which needs no other; an error on one rank is raised on all."""
        error, found = None, []
        try:
            found.append(act())
        except Exception as raised:  # told to the other ranks, then raised
            error = raised
        self._settle(error, what)
        return found[0]

    def _settle(self, error: Exception | None, what: str, number: int = 0) -> list[int]:
        """Every rank is done with `what`: an error on one is raised on all. The ranks' numbers."""
        if self._mesh.size() == 1:
            if error is not None:
                raise error
            return [number]
        mine = torch.tensor([error is not None, number], device=self._device)
        every = [torch.empty_like(mine) for _ in range(self._mesh.size())]
        # On the mesh's own group: ranks may be minutes apart here (a slow disk), which the checks' patience
        # is not made for.
        dist.all_gather(every, mine, group=self._context.group(tuple(self._mesh.mesh_dim_names)))
        if any(bool(row[0]) for row in every):
            texts = self._meeting.texts("" if error is None else failure_line(error), what)
            if error is not None:
                raise error
            rank, text = next((r, t) for r, t in texts.items() if t)
            raise RankFailed(f"rank {rank}: {text}")
        return [int(row[1]) for row in every]

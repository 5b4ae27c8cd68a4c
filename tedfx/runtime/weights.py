"""Weights for a ParallelModule whose model has none (it was made on the meta device), and a folder of them
from any.

A rank holds its share of every parameter from the start, empty. `init_weights`, `load_pretrained` and
`load_state_dict` fill it; before one of them has, whatever needs weights is refused. Beside the share at most
one tensor of the model is in memory in full, on the host: the one that is initialised, converted or gathered.

All three methods are collectives over the mesh: every rank calls them with the same arguments. An error on
one rank is raised on all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tedfx import _transformers
from tedfx.errors import ConfigError, TedfxError
from tedfx.ranks.failures import RankFailed, failure_line
from tedfx.state.hf_folder import Folder, box_of, plan
from tedfx.state.initialise import Slot, initialise
from tedfx.state.parameters import Placed
from tedfx.state.shards import Writer, check_target

WAYS = "give it weights first: pm.init_weights(), pm.load_pretrained(folder) or pm.load_state_dict(state)"


class NoWeights(TedfxError, RuntimeError):
    """The module was made on the meta device and has no weights yet."""


class WeightAccess:
    """Mixed into ParallelModule. Uses its `_placed`, `_parameter`, `get_buffer`, `_meeting`, `_context`."""

    def _init_weights_state(self, origin: nn.Module | None, absent: Iterable[str]) -> None:
        """origin: the user's model; absent: its tensors (tied ones by their first name) that have no values
        yet."""
        self._origin, self._absent = (origin,), set(absent)  # in a tuple: it is no submodule of this one
        self._conversions: list | None = None

    # ---- without weights -----------------------------------------------------------------------------------

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

    def _names(self) -> list[tuple[str, Placed | None, tuple[str, ...]]]:
        """(parameter or buffer, its layout, the user's names of one tensor in it, the first of which stands
        for all)."""
        rows: list = []
        for name, placed in self._placed.items():
            rows.extend((name, placed, names) for names in placed.layout.groups)
        return rows + [(name, None, (name,)) for name in self._buffer_names()]

    def _local(self, name: str, placed: Placed) -> Tensor:
        return self._parameter(name).to_local().detach().view(placed.kept.shape)

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
                keep = lambda full, n=names[0], p=placed, local=self._local(name, placed): p.kept.cut(
                    n, full, local
                )
                fetch = lambda n=names[0], p=placed, name=name: self._whole(name, p, n).cpu()
            slots.append(Slot(names[0], meta, keep, fetch, muted=only is not None and names[0] not in only))
        return slots

    def _whole(self, name: str, placed: Placed, user_name: str, to_first: bool = False) -> Tensor:
        """The user's full tensor, on every rank (or of use on the first one only), bit by bit. A
        collective."""
        local, layout = self._local(name, placed), placed.layout
        full = torch.zeros(
            layout.shape[1:] if layout.sources else layout.shape, dtype=local.dtype, device=local.device
        )
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

    # ---- folders -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def load_pretrained(self, path: str | os.PathLike) -> None:
        """Read a folder that `from_pretrained` reads: model.safetensors, or model.safetensors.index.json with
        its shards.

        path   a local folder, seen by every rank. For a model of Hugging Face transformers its names are a
               checkpoint's, and the library's conversions (experts merged, gate and up joined, renames) are
               made while reading; for other modules they are those of their state dict. Of tied tensors one
               name is enough.

        Each rank reads the slices that it holds; where a conversion is none of stack, concatenate, chunk and
        transpose, one target's sources at a time are read whole. Values are cast to the parameters' dtypes.
        Raises CheckpointError in one line where the folder is not there or does not fit (missing, too many,
        other shapes, quantized), before anything is changed. A failure while reading leaves the module
        without weights.
        """
        model, rows = (
            self._model(),
            [row for row in self._names() if row[1] is not None or row[0] not in self._non_persistent],
        )
        error = None
        try:
            folder = Folder(path)
            nodes, used = plan(model, folder, self._wanted(), [names for _, _, names in rows])
            picked = {names[0]: self._same(folder, nodes, placed, names) for _, placed, names in rows}
            self._fill_buffers()
        except Exception as raised:  # told to the other ranks, then raised
            error = raised
        self._settle(error, "load_pretrained")
        mine = {names[0] for _, _, names in rows}
        self._absent |= mine
        try:
            for name, placed, names in rows:
                target = self.get_buffer(name) if placed is None else self._local(name, placed)
                with folder.reading() as read:
                    self._fill(nodes[picked[names[0]]], target, placed, picked[names[0]], read)
        except Exception as raised:
            error = raised
        self._settle(error, "load_pretrained")
        self._absent -= mine
        self._conversions = used

    def _wanted(self) -> dict[str, Tensor]:
        """{user's name: a tensor without values, of its shape and dtype}: parameters and persistent
        buffers."""
        wanted = {}
        for name, placed, names in self._names():
            tensor = self.get_buffer(name) if placed is None else self._parameter(name).to_local()
            if placed is not None or name not in self._non_persistent:
                shape = (
                    tensor.shape
                    if placed is None
                    else placed.layout.shape[1:]
                    if placed.layout.sources
                    else placed.layout.shape
                )
                wanted.update((n, torch.empty(shape, dtype=tensor.dtype, device="meta")) for n in names)
        return wanted

    def _same(self, folder: Folder, nodes: dict, placed: Placed | None, names: tuple[str, ...]) -> str:
        """The name to read a tied tensor by; where the folder has several, this rank's parts of them have to
        be equal."""
        first, *others = [name for name in names if name in nodes]
        for other in others:
            for offsets, where in placed.kept.chunks[first]:
                with folder.reading() as read:
                    box = box_of(offsets, torch.empty(placed.kept.shape, device="meta")[where].shape)
                    parts = [
                        torch.empty([b.stop - b.start for b in box], dtype=torch.float64) for _ in range(2)
                    ]
                    for node, part in zip((nodes[first], nodes[other]), parts):
                        node.fill(box, part, read)
                if not torch.equal(*parts):
                    raise ConfigError(
                        f"{folder.path}: {first} and {other} are one tensor in the model and differ in "
                        "the checkpoint; make the model without tying them"
                    )
        return first

    def _fill(self, node, target: Tensor, placed: Placed | None, name: str, read) -> None:
        boxes = [((0,) * target.dim(), ...)] if placed is None else placed.kept.chunks[name]
        for offsets, where in boxes:
            part = target[where]
            node.fill(box_of(offsets, part.shape), part, read)

    @torch.no_grad()
    def save_pretrained(
        self,
        path: str | os.PathLike,
        max_shard_size: int | str = "5GB",
        overwrite: bool = False,
        dry_run: bool = False,
    ) -> None:
        """Write a folder that plain `from_pretrained` (and `load_pretrained`) reads, with the same weights
        bit by bit.

        path             a new or empty folder. The first rank writes, into a folder beside it that is renamed
                         at the end: a folder of this name is complete.
        max_shard_size   bytes per file, a number or "5GB".
        overwrite        replace a folder of weights that is there, by renames when the new one is complete;
                         what else is in it (a tokenizer) stays.
        dry_run          look whether it can be done, and write nothing: before a training run whose end it
                         is.

        Config, generation config and names are those of the library's own `save_pretrained`; for modules that
        are not of Hugging Face transformers the files hold the state dict alone. One parameter at a time is
        gathered, converted and written at its place in its file. Raises ConfigError where the folder is not
        empty or the model cannot be saved so.
        """
        self.require_weights("save_pretrained")
        model, first = self._model(), dist.get_rank() == self._meeting.ranks[0]
        pretrained, rows, wanted = _transformers.is_pretrained(model), {}, self._wanted()
        for name, placed, names in self._names():
            if placed is not None or name not in self._non_persistent:
                kept = (
                    [n for n in names if n not in _transformers.tied(model)][:1] or names[:1]
                    if pretrained
                    else names
                )
                rows.update((n, (name, placed, names[0])) for n in kept)
        error, writer = None, None
        try:
            if pretrained:
                _transformers.check_savable(model)
                rows = {n: row for n, row in rows.items() if n not in _transformers.ignored_on_save(model)}
                groups = _transformers.save_groups(model, list(rows), self._conversions)
                convert = lambda tensors: _transformers.to_checkpoint(model, tensors, self._conversions)
            else:
                groups, convert = [[name] for name in rows], dict
            if first:
                planned: dict[str, Tensor] = {}
                for group in groups:
                    planned.update(convert({name: wanted[name] for name in group}))
                if dry_run:
                    check_target(os.path.realpath(path), overwrite)
                else:
                    writer = Writer(path, planned, max_shard_size, overwrite)
                if pretrained and writer is not None:
                    dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)
                    _transformers.save_configs(model, dtype, writer.folder)
        except Exception as raised:  # told to the other ranks, then raised
            error = raised
        try:
            self._settle(error, "save_pretrained")
            if dry_run:
                return
            for group in groups:
                full = {
                    n: self._whole(name, placed, tensor, to_first=True)
                    if placed is not None
                    else self.get_buffer(name)
                    for n in group
                    for name, placed, tensor in [rows[n]]
                }
                error = None
                if first:
                    try:
                        for name, tensor in convert(full).items():
                            writer.write(name, tensor)
                    except Exception as raised:
                        error = raised
                del full
                self._settle(error, "save_pretrained")
            try:
                if first:
                    writer.finish()
            except Exception as raised:
                error = raised
            self._settle(error, "save_pretrained")
        except BaseException:
            if writer is not None:
                writer.abandon()
            raise

"""Folders of weights, in and out, for a ParallelModule of any model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from tedfx import _transformers
from tedfx.errors import ConfigError
from tedfx.runtime.weights import Row, Weights
from tedfx.state.hf_folder import Folder, box_of, nodes_of
from tedfx.state.lazy import Node, Read
from tedfx.state.parameters import Placed
from tedfx.state.shards import Writer, check_target


class Pretrained(Weights):
    """`load_pretrained` and `save_pretrained`."""

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
        model = self._model()
        rows = [row for row in self._names() if row[1] is not None or row[0] not in self._non_persistent]

        def look():
            folder = Folder(path)
            nodes, used = nodes_of(model, folder, self._wanted(), [names for _, _, names in rows])
            picked = [nodes[self._same(folder, nodes, placed, names)] for _, placed, names in rows]
            self._fill_buffers()
            return folder, picked, used

        folder, picked, used = self._together("load_pretrained", look)
        mine = {names[0] for _, _, names in rows}
        self._absent |= mine

        def fill():
            for node, (name, placed, names) in zip(picked, rows):
                with folder.reading() as read:
                    self._fill(node, name, placed, names, read)

        self._together("load_pretrained", fill)
        self._absent -= mine
        self._conversions = used

    def _wanted(self) -> dict[str, Tensor]:
        """{user's name: a tensor without values, of its shape and dtype}: parameters and persistent
        buffers."""
        wanted = {}
        for name, placed, names in self._names():
            if placed is None and name in self._non_persistent:
                continue
            tensor = self.get_buffer(name) if placed is None else self.get_parameter(name)
            shape = tensor.shape if placed is None else placed.layout.user_shape
            wanted.update((n, torch.empty(shape, dtype=tensor.dtype, device="meta")) for n in names)
        return wanted

    def _same(
        self, folder: Folder, nodes: Mapping[str, Node], placed: Placed | None, names: tuple[str, ...]
    ) -> str:
        """The name to read a tied tensor by; where the folder has several, this rank's parts of them have to
        be equal."""
        first, *others = [name for name in names if name in nodes]
        for other in others:
            assert placed is not None  # buffers are not tied
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

    def _fill(self, node: Node, name: str, placed: Placed | None, names: tuple[str, ...], read: Read) -> None:
        """Read this rank's boxes of a tensor."""
        if placed is None:
            target = self.get_buffer(name)
            node.fill(box_of((0,) * target.dim(), target.shape), target, read)
            return
        target = self.local(name)
        for offsets, where in placed.kept.chunks[names[0]]:
            node.fill(box_of(offsets, target[where].shape), target[where], read)

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
        first, writers = dist.get_rank() == self._meeting.ranks[0], []

        def look():
            rows, groups, convert = self._as_saved()
            if first and dry_run:
                check_target(os.path.realpath(path), overwrite)
            elif first:
                planned: dict[str, Tensor] = {}
                wanted = self._wanted()
                for group in groups:
                    planned.update(convert({name: wanted[name] for name in group}))
                writers.append(Writer(path, planned, max_shard_size, overwrite))
                self._save_configs(writers[0])
            return rows, groups, convert

        def write(full: dict[str, Tensor]) -> None:
            for writer in writers:
                for name, tensor in convert(full).items():
                    writer.write(name, tensor)

        try:
            rows, groups, convert = self._together("save_pretrained", look)
            if dry_run:
                return
            for group in groups:
                full = {name: self._full(*rows[name]) for name in group}
                self._together("save_pretrained", partial(write, full))
                del full
            self._together("save_pretrained", lambda: [writer.finish() for writer in writers])
        except BaseException:
            for writer in writers:
                writer.abandon()
            raise

    def _as_saved(self) -> tuple[dict[str, Row], list[list[str]], Callable]:
        """({name that is saved: its row, as `_names` has it}, names that are converted together, the
        conversion)."""
        model = self._model()
        rows = [row for row in self._names() if row[1] is not None or row[0] not in self._non_persistent]
        if not _transformers.is_pretrained(model):
            every = {name: row for row in rows for name in row[2]}
            return every, [[name] for name in every], dict
        _transformers.check_savable(model)
        tied, ignored = _transformers.tied(model), _transformers.ignored_on_save(model)
        kept = {}
        for row in rows:
            name = next((name for name in row[2] if name not in tied), row[2][0])
            if name not in ignored:
                kept[name] = row
        groups = _transformers.save_groups(model, list(kept), self._conversions)
        return kept, groups, lambda tensors: _transformers.to_checkpoint(model, tensors, self._conversions)

    def _save_configs(self, writer: Writer) -> None:
        model = self._model()
        if _transformers.is_pretrained(model):
            dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)
            _transformers.save_configs(model, dtype, writer.folder)

    def _full(self, name: str, placed: Placed | None, names: tuple[str, ...]) -> Tensor:
        """The full tensor, of use on the first rank. Of a parameter, a collective."""
        if placed is None:
            return self.get_buffer(name)
        return self._whole(name, placed, names[0], to_first=True)

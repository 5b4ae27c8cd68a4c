"""A folder of checkpoints: which of them is whole, which is the latest, and what is wrong with one that cannot be read.

    folder/step-00000100/      one checkpoint, as torch.distributed.checkpoint writes it
    folder/step-00000200.tmp/  one that is being written, or whose writers were killed
    folder/latest              names of the whole ones, newest first, one a line

A checkpoint is written under its temporary name. When every rank has written its part the first rank renames it, and
then puts a new `latest` in the place of the old one. So at any moment `latest` names whole checkpoints only, whenever a
process is killed; a name that `latest` holds is never written to again.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from itertools import product
from math import prod
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from tedfx.errors import TedfxError

LATEST = "latest"
AUTO = 'load("auto") takes the latest whole one'


class CheckpointError(TedfxError, RuntimeError):
    """A checkpoint cannot be written, cannot be read, or is not one of this model and optimizer."""


class Folder:
    """`keep` checkpoints are kept. Only the first rank writes through it."""

    def __init__(self, path: str | os.PathLike, keep: int):
        self.path, self.keep = Path(path), keep

    def named(self) -> list[str]:
        """Names of the whole checkpoints, newest first."""
        try:
            return (self.path / LATEST).read_text().split()
        except FileNotFoundError:
            return []

    def find(self, given: str | os.PathLike) -> Path | None:
        """The checkpoint that "auto" or a path (of a checkpoint, or of a folder of them) means; None where "auto" finds none."""
        place = self if given == "auto" else Folder(given, 1)
        names = place.named()
        if not names:
            return None if given == "auto" else place.path
        if not (place.path / names[0]).is_dir():
            rest = ", ".join(names[1:]) or "none"
            raise CheckpointError(f"{place.path / LATEST} names {names[0]}, which is not there: give the path of another checkpoint (others named: {rest})")
        return place.path / names[0]

    def begin(self, name: str) -> None:
        """Make room for one that is about to be written: what killed writers left is removed."""
        self.path.mkdir(parents=True, exist_ok=True)
        for left in self.path.glob("step-*.tmp"):
            shutil.rmtree(left)
        self.temporary(name).mkdir()

    def temporary(self, name: str) -> Path:
        return self.path / f"{name}.tmp"

    def end(self, name: str) -> None:
        """All ranks have written: name it, then remove those beyond `keep`."""
        names, target, number = self.named(), name, 1
        while target in names:  # this step was saved before, by a run that was resumed from an earlier one
            number += 1
            target = f"{name}-{number}"
        if (self.path / target).exists():  # renamed once, but killed before it was named
            shutil.rmtree(self.path / target)
        _sync(self.temporary(name))
        os.rename(self.temporary(name), self.path / target)
        _sync(self.path)
        names = [target, *names]
        with open(self.path / f"{LATEST}.tmp", "w") as file:
            file.write("".join(f"{each}\n" for each in names[: self.keep]))
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.path / f"{LATEST}.tmp", self.path / LATEST)
        _sync(self.path)
        for old in names[self.keep :]:
            shutil.rmtree(self.path / old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Names of files are on the disk only when their directory is."""
    place = os.open(path, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)


class Writer(FileSystemWriter):
    """Writes `name` under its temporary name; `finish`, which the first rank runs when all have written, names it."""

    def __init__(self, folder: Folder, name: str):
        super().__init__(folder.temporary(name))
        self._folder, self._name = folder, name

    def finish(self, metadata, results) -> None:
        super().finish(metadata, results)
        self._folder.end(self._name)


# ---- is it whole? --------------------------------------------------------------------------------------------------


def read_metadata(path: Path) -> Metadata:
    """What the checkpoint at `path` says of itself; CheckpointError where it is none, is not whole or cannot be read."""
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint at {path} (every host must see the folder); {AUTO}")
    if not (path / ".metadata").is_file():
        raise CheckpointError(f"{path} is not a whole checkpoint, it has no .metadata: its writers did not finish; {AUTO}")
    try:
        metadata = FileSystemReader(path).read_metadata()
        files: dict[str, int] = {}
        for place in metadata.storage_data.values():
            files[place.relative_path] = max(files.get(place.relative_path, 0), place.offset + place.length)
        tensors = {key: entry for key, entry in metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)}
    except Exception as error:  # noqa: BLE001  what unpickling garbage raises is anything
        raise CheckpointError(f"{path} is damaged, its .metadata cannot be read ({type(error).__name__}); load another one") from error
    for name, size in files.items():
        have = (path / name).stat().st_size if (path / name).is_file() else None
        if have is None or have < size:
            raise CheckpointError(f"{path} is damaged, {name} " + ("is not there" if have is None else f"has {have} of {size} bytes") + "; load another one")
    for key, entry in tensors.items():
        if not tiles(entry.size, [(chunk.offsets, chunk.sizes) for chunk in entry.chunks]):
            held = sum(prod(chunk.sizes) for chunk in entry.chunks)
            raise CheckpointError(
                f"{path}: the {len(entry.chunks)} pieces of {key} ({held} elements) do not tile its shape {tuple(entry.size)}: "
                "ranks of one mesh did not write all of it, each once; load another one"
            )
    return metadata


def tiles(shape, boxes) -> bool:
    """Whether boxes (offsets, sizes) cover every element of `shape` exactly once.

    The indicator functions of the boxes sum to that of the whole exactly when their mixed differences do, and that of a
    box is +-1 in each of its corners. So gaps, overlaps and pieces outside are found in one pass over the corners.
    """
    corners: Counter = Counter()
    for sign, offsets, sizes in [(-1, [0] * len(shape), shape), *((1, *box) for box in boxes)]:
        if len(offsets) != len(shape) or any(size < 0 for size in sizes):
            return False
        if not prod(sizes):
            continue
        for upper in product((0, 1), repeat=len(shape)):
            corners[tuple(o + n * u for o, n, u in zip(offsets, sizes, upper))] += sign * (-1) ** sum(upper)
    return not any(corners.values())

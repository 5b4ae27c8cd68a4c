"""A folder of checkpoints: which of them is whole, which is the latest, and what is wrong with one that
cannot be read.

    folder/step-00000100/      one checkpoint, as torch.distributed.checkpoint writes it, and checksums
    folder/step-00000200.tmp/  one that is being written, or whose writers were killed
    folder/latest              names of the whole ones, newest first, one a line
    folder/owner               the run that writes here (`tedfx/saving/owner.py`)

A checkpoint is written under its temporary name. When every rank has written its part the first rank renames
it, and then puts a new `latest` in the place of the old one. So at any moment `latest` names whole
checkpoints only, whenever a process is killed; a name that `latest` holds is never written to again. Where
`latest` itself is lost or damaged, the checkpoints that are there count, the last saved first, and the next
save writes it anew.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from itertools import product
from math import prod
from pathlib import Path

from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.futures import Future

from tedfx.errors import TedfxError
from tedfx.saving import owner
from tedfx.saving.checksums import Summing, Written, read_checksums, write_checksums

LATEST, METADATA = "latest", ".metadata"
AUTO = 'load("auto") takes the latest whole one'
_NAME = re.compile(r"step-(\d+)(?:-(\d+))?")


class CheckpointError(TedfxError, RuntimeError):
    """A checkpoint cannot be written, cannot be read, or is not one of this model and optimizer."""


class Damaged(CheckpointError):
    """A checkpoint that is there is not what was written."""


class Folder:
    """`keep` checkpoints are kept. Only the first rank writes through it."""

    def __init__(self, path: str | os.PathLike, keep: int):
        self.path, self.keep = Path(path), keep
        self._owner: owner.Owner | None = None

    def named(self) -> tuple[list[str], str]:
        """Names of the whole checkpoints, newest first, and what is wrong with `latest`, "" where nothing
        is."""
        latest = self.path / LATEST
        try:
            words = latest.read_text(errors="replace").split()
        except FileNotFoundError:
            words = None
        if words and all(map(_NAME.fullmatch, words)) and (self.path / words[0]).is_dir():
            return [word for word in words if (self.path / word).is_dir()], ""
        there = self._there()
        if words is None:
            return there, f"{latest} is not there" if there else ""
        return (
            there,
            f"{latest} is empty"
            if not words
            else f"{latest} names {words[0]}, which is not there"
            if _NAME.fullmatch(words[0])
            else f"{latest} is damaged",
        )

    def _there(self) -> list[str]:
        """Names of the folders that look like checkpoints, the last saved first: by the time in their
        checksums (those without are older), then by step."""

        def age(name: re.Match[str]) -> tuple:
            step, again = name.groups()
            try:
                said = read_checksums(self.path / name.string)
            except ValueError:  # damaged; to be found when it is loaded
                said = None
            return said["saved"] if said else 0.0, int(step), int(again or 1)

        names = [
            name
            for p in self.path.glob("step-*")
            if (name := _NAME.fullmatch(p.name)) and (p / METADATA).is_file()
        ]
        return [name.string for name in sorted(names, key=age, reverse=True)]

    def find(self, given: str | os.PathLike) -> tuple[list[Path], str]:
        """The checkpoint that "auto" or a path (of a checkpoint, or of a folder of them) means, and behind it
        the older ones of the same folder; none where "auto" finds none. And what is wrong with `latest`."""
        place = self if given == "auto" else Folder(given, 1)
        names, wrong = place.named()
        if wrong and not names:
            raise CheckpointError(
                f"{wrong}, and no whole checkpoint is in {place.path}: remove {LATEST} to start from "
                "the beginning, or give the path of a checkpoint"
            )
        if names or given == "auto":
            return [place.path / name for name in names], wrong
        parent, name = Folder(place.path.parent, 1), place.path.name
        beside = parent._there()
        return [
            place.path,
            *(
                parent.path / each
                for each in beside[beside.index(name) + 1 if name in beside else 0 :]
                if each != name
            ),
        ], ""

    def claim(self) -> None:
        """Make the folder, and make it this process's: CheckpointError while another run that lives writes to
        it."""
        self.path.mkdir(parents=True, exist_ok=True)
        found = owner.claim(self.path)
        if isinstance(found, str):
            raise CheckpointError(
                f"another run writes its checkpoints to {self.path} ({found}): give this run a folder "
                "of its own, or end that one; if that process is gone, remove "
                f"{self.path / owner.OWNER}"
            )
        self._owner = found

    def begin(self, name: str) -> None:
        """Make room for one that is about to be written: what killed writers left is removed."""
        self.claim()
        for left in self.path.glob("step-*.tmp"):
            shutil.rmtree(left)
        self.temporary(name).mkdir()

    def temporary(self, name: str) -> Path:
        return self.path / f"{name}.tmp"

    def end(self, name: str) -> None:
        """All ranks have written: name it, then remove those beyond `keep`."""
        (names, _), target, number = self.named(), name, 1
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
    """Writes `name` under its temporary name; `finish`, which the first rank runs when all have written,
    names it. Sums of files go the way of DCP's results."""

    def __init__(self, folder: Folder, name: str):
        super().__init__(folder.temporary(name))
        self._folder, self._name = folder, name
        self.fs = Summing()

    def write_data(self, plan, planner) -> Future:
        written = super().write_data(plan, planner).wait()
        with_sums: Future = Future()
        with_sums.set_result(
            [
                Written(
                    each.index,
                    each.size_in_bytes,
                    each.storage_data,
                    self.fs.sums[each.storage_data.relative_path],
                )
                for each in written
            ]
        )
        return with_sums

    def finish(self, metadata: Metadata, results: list[list[Written]]) -> None:
        sums = {each.storage_data.relative_path: each.file for rank in results for each in rank}
        super().finish(metadata, [[*rank] for rank in results])
        (said,) = (
            each for name, each in self.fs.sums.items() if name.startswith(METADATA)
        )  # DCP writes it beside and renames it
        write_checksums(Path(self.path), {**sums, METADATA: said})
        self._folder.end(self._name)


# ---- is it whole? ------------------------------------------------------------------------------------------


def check_finished(path: Path) -> None:
    """CheckpointError where `path` is no checkpoint, Damaged where its writers did not finish."""
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint at {path} (every host must see the folder); {AUTO}")
    if not (path / METADATA).is_file():
        raise Damaged("has no .metadata: its writers did not finish")


def read_metadata(path: Path) -> Metadata:
    """What the checkpoint at `path` says of itself; CheckpointError where it is none, Damaged where it is not
    whole or cannot be read."""
    check_finished(path)
    try:
        metadata = FileSystemReader(path).read_metadata()
        files: dict[str, int] = {}
        for place in metadata.storage_data.values():
            files[place.relative_path] = max(files.get(place.relative_path, 0), place.offset + place.length)
        tensors = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
    except Exception as error:  # what unpickling garbage raises is anything
        raise Damaged(f"its .metadata cannot be read ({type(error).__name__})") from error
    for name, size in files.items():
        have = (path / name).stat().st_size if (path / name).is_file() else None
        if have is None or have < size:
            raise Damaged(f"{name} " + ("is not there" if have is None else f"has {have} of {size} bytes"))
    for key, entry in tensors.items():
        if not tiles(entry.size, [(chunk.offsets, chunk.sizes) for chunk in entry.chunks]):
            held = sum(prod(chunk.sizes) for chunk in entry.chunks)
            raise Damaged(
                f"the {len(entry.chunks)} pieces of {key} ({held} elements) do not tile its shape "
                f"{tuple(entry.size)}: ranks of one mesh did not write all of it, each once"
            )
    return metadata


def tiles(shape, boxes) -> bool:
    """Whether boxes (offsets, sizes) cover every element of `shape` exactly once.

    The indicator functions of the boxes sum to that of the whole exactly when their mixed differences do, and
    that of a box is +-1 in each of its corners. So gaps, overlaps and pieces outside are found in one pass
    over the corners.
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

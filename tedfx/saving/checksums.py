"""A checksum for every file of a checkpoint, taken of what was handed to the disk and compared when it is
read.

    step-00000100/checksums.json   {"algorithm": "crc32", "saved": seconds,
                                    "files": {name: [bytes, checksum]}, "own": checksum of the rest}

A rank's sums are made while its data is written, of the bytes in memory, so nothing is read twice and what
the disk or the page cache does to them afterwards is seen. They travel to the first rank with what DCP
gathers anyway. A load reads all files once more, each rank a share of them. CRC-32 finds every damage of 32
bits or less in a row, and any other but for one in 2**32; it is no protection against intent, as a checkpoint
itself (a pickle) has none.
"""

from __future__ import annotations

import io
import json
import os
import time
import zlib
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.storage import WriteResult

CHECKSUMS, ALGORITHM = "checksums.json", "crc32"
BLOCK = 2**22  # bytes that are read at a time


@dataclass(frozen=True)
class Sum:
    """Of one file: how long it is, and its CRC-32."""

    bytes: int
    crc: int

    def after(self, data) -> Sum:
        return Sum(self.bytes + memoryview(data).nbytes, zlib.crc32(data, self.crc))


EMPTY = Sum(0, 0)


@dataclass(frozen=True)
class Written(WriteResult):
    """What DCP says of a value that a rank wrote, and the sum of the file that it is in."""

    file: Sum = EMPTY


class Summing(FileSystem):
    """Writes as `FileSystem` does. sums: by file name, of all that was written to it."""

    def __init__(self):
        self.sums: dict[str, Sum] = {}

    @contextmanager
    def create_stream(self, path, mode):
        with super().create_stream(path, mode) as stream:
            if "w" not in mode:
                yield stream
                return
            through = _Through(stream)
            yield through
            self.sums[Path(path).name] = through.sum


class _Through:
    """A file that is written in one go; the sum of what went through."""

    def __init__(self, stream):
        self._stream, self.sum = stream, EMPTY

    def write(self, data) -> int:
        self.sum = self.sum.after(data)
        return self._stream.write(data)

    def seek(self, *args):
        raise io.UnsupportedOperation("a file of a checkpoint is written in one go")

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def write_checksums(path: Path, sums: Mapping[str, Sum]) -> None:
    """checksums.json of the checkpoint at `path`, on the disk when this returns."""
    said = {
        "algorithm": ALGORITHM,
        "saved": time.time(),
        "files": {name: [each.bytes, f"{each.crc:08x}"] for name, each in sorted(sums.items())},
    }
    with open(path / CHECKSUMS, "w") as file:
        json.dump({**said, "own": _own(said)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _own(said: Mapping) -> str:
    return f"{zlib.crc32(json.dumps(said, sort_keys=True).encode()):08x}"


def read_checksums(path: Path) -> dict | None:
    """What checksums.json says; None where there is none. ValueError where it is not what was written."""
    try:
        said = json.loads((path / CHECKSUMS).read_bytes())
        own = said.pop("own")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{CHECKSUMS} cannot be read") from error
    if own != _own(said):
        raise ValueError(f"{CHECKSUMS} is not what was written")
    if said["algorithm"] != ALGORITHM:
        raise ValueError(
            f"{CHECKSUMS} has sums of the kind {said['algorithm']}, this version knows {ALGORITHM}"
        )
    return said


def damage(path: Path, share: int = 0, shares: int = 1) -> list[str]:
    """What is wrong with those files of the checkpoint at `path` that are number `share` of `shares`; nothing
    where it has no checksums."""
    try:
        said = read_checksums(path)
    except ValueError as error:
        return [str(error)]
    if not said:
        return []
    found = []
    for name in _share({name: size for name, (size, _) in said["files"].items()}, share, shares):
        size, wanted = said["files"][name]
        have = (path / name).stat().st_size if (path / name).is_file() else None
        if have != size:
            found.append(f"{name} " + ("is not there" if have is None else f"has {have} of {size} bytes"))
        elif f"{sum_of(path / name).crc:08x}" != wanted:
            found.append(f"{name} does not have the checksum with which it was written")
    return found


def _share(sizes: Mapping[str, int], share: int, shares: int) -> list[str]:
    """The largest first, each to who has least."""
    loads = [0] * shares
    mine = []
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        least = loads.index(min(loads))
        loads[least] += size + 1
        if least == share:
            mine.append(name)
    return mine


def sum_of(path: Path) -> Sum:
    found, block = EMPTY, memoryview(bytearray(BLOCK))
    with open(path, "rb", buffering=0) as file:
        while read := file.readinto(block):
            found = found.after(block[:read])
    return found

"""Writing safetensors in pieces: the header first, then each tensor at its place, in any order, one in memory
at a time.

The format (https://huggingface.co/docs/safetensors): eight bytes with the length of a JSON header,
little-endian, the header {name: {dtype, shape, data_offsets}}, the data without gaps. A file of the library
is written in one call from all of its tensors; this one needs none to be there but the one that is written.

`Writer` fills a folder beside the wanted one and renames it at the end, so that a folder of that name is
complete. One that is there is replaced only when asked, and then what is no weights in it (a tokenizer, a
README) stays.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tedfx.errors import ConfigError
from tedfx.state.hf_folder import INDEX, SINGLE

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
}
_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}


def size_in_bytes(size: int | str) -> int:
    """5000000000, "5GB", "200MB", "4GiB"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", str(size).upper())
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"max_shard_size={size!r}: pass a number of bytes or a string such as '5GB'")
    return max(1, int(float(match[1]) * _UNITS[match[2] or ""]))


# What a save writes, and what other ways to save the same weights do: it goes when a folder is replaced.
_OURS = re.compile(
    r"config\.json|generation_config\.json|.*\.safetensors|.*\.safetensors\.index\.json|pytorch_model.*\.(bin|index\.json)"
)


def check_target(path: str, overwrite: bool) -> None:
    """ConfigError where a folder of weights may not be written to `path`: it is there and not empty, unless
    `overwrite` and it holds weights."""
    if not os.path.exists(path) or (os.path.isdir(path) and not os.listdir(path)):
        return
    if not overwrite:
        raise ConfigError(
            f"{path} exists and is not an empty folder: give a new one, or overwrite=True to replace "
            "its weights when the new ones are complete"
        )
    if not any(os.path.isfile(os.path.join(path, name)) for name in (SINGLE, INDEX)):
        raise ConfigError(
            f"{path} is not a folder of weights, it holds neither {SINGLE} nor {INDEX}: overwrite=True "
            "replaces only those; give a new folder"
        )


class Writer:
    """`tensors`: {name: tensor of its shape and dtype (no values needed)}, in the order in which they fill
    the shards. See `check_target` for `overwrite`."""

    def __init__(
        self,
        path: str | os.PathLike,
        tensors: Mapping[str, Tensor],
        max_shard_size: int | str,
        overwrite: bool = False,
    ):
        self.path = os.path.realpath(os.fspath(path))
        check_target(self.path, overwrite)
        limit, shards, room = size_in_bytes(max_shard_size), [], 0
        for name, tensor in tensors.items():
            if tensor.dtype not in _NAMES:
                raise ConfigError(f"{name}: safetensors has no {tensor.dtype}")
            if not shards or (tensor.nbytes > room and shards[-1]):
                shards.append([])
                room = limit
            shards[-1].append(name)
            room -= tensor.nbytes
        shards = shards or [[]]
        files = (
            [SINGLE]
            if len(shards) == 1
            else [f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors" for k in range(len(shards))]
        )
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        self.folder = tempfile.mkdtemp(
            prefix=os.path.basename(self.path) + ".unfinished-", dir=os.path.dirname(self.path)
        )
        self._tensors, self._files, self._place, self._left = tensors, {}, {}, set(tensors)
        try:
            for file, names in zip(files, shards):
                self._begin(file, names)
            if len(files) > 1:
                index = {
                    "metadata": {
                        "total_parameters": sum(t.numel() for t in tensors.values()),
                        "total_size": sum(t.nbytes for t in tensors.values()),
                    },
                    "weight_map": {name: file for file, names in zip(files, shards) for name in names},
                }
                with open(os.path.join(self.folder, INDEX), "w", encoding="utf-8") as f:
                    f.write(json.dumps(index, indent=2, sort_keys=True) + "\n")
        except BaseException:
            self.abandon()
            raise

    def _begin(self, file: str, names: list[str]) -> None:
        header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
        offset, places = 0, {}
        for name in sorted(
            names, key=lambda n: -self._tensors[n].element_size()
        ):  # large elements first: all are aligned
            tensor = self._tensors[name]
            header[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.nbytes],
            }
            places[name], offset = offset, offset + tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        handle = open(os.path.join(self.folder, file), "wb")
        self._files[file] = handle
        handle.write(struct.pack("<Q", len(text)) + text)
        self._place.update((name, (handle, 8 + len(text) + at)) for name, at in places.items())

    def write(self, name: str, tensor: Tensor) -> None:
        planned, data = self._tensors[name], tensor.detach().to("cpu").contiguous()
        if data.shape != planned.shape or data.dtype != planned.dtype or name not in self._left:
            raise ConfigError(
                f"{name}: {tuple(data.shape)} {data.dtype} is not what was planned, or was written before"
            )
        handle, at = self._place[name]
        handle.seek(at)
        if data.nbytes:
            handle.write((ctypes.c_char * data.nbytes).from_address(data.data_ptr()))
        self._left.discard(name)

    def finish(self) -> None:
        """The folder under its own name, if everything was written."""
        if self._left:
            raise ConfigError(f"{len(self._left)} tensors were not written, {min(self._left)} among them")
        for handle in self._files.values():
            handle.flush()
            os.fsync(handle.fileno())
            handle.close()
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(self.folder, 0o777 & ~umask)
        self._name()

    def _name(self) -> None:
        """Give the folder its name: at any moment there is the old one or the new one, but for the moment
        between two renames, in which the old one has another name."""
        if not os.path.isdir(self.path) or not os.listdir(self.path):
            os.rename(self.folder, self.path)  # over an empty folder too
            return
        for name in os.listdir(self.path):
            if not _OURS.fullmatch(name):
                copy = shutil.copytree if os.path.isdir(os.path.join(self.path, name)) else shutil.copy2
                copy(os.path.join(self.path, name), os.path.join(self.folder, name))
        old = tempfile.mkdtemp(
            prefix=os.path.basename(self.path) + ".replaced-", dir=os.path.dirname(self.path)
        )
        os.rename(self.path, old)
        try:
            os.rename(self.folder, self.path)
        except BaseException:
            os.rename(old, self.path)
            raise
        shutil.rmtree(old, ignore_errors=True)

    def abandon(self) -> None:
        for handle in self._files.values():
            handle.close()
        shutil.rmtree(self.folder, ignore_errors=True)

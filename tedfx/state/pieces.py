"""A user's tensor of which a rank holds boxes that no plain `Shard` placement can describe.

Two layouts need it: a fused dim split on its inner factor (gate|up over `tp`: a rank has rows of the gate and
the same rows of the up half, apart), and one expert of a stack that is sharded by expert (a rank has all of
it, a slice, or nothing). `torch.distributed.checkpoint` asks any tensor for its chunks through three methods;
with them a checkpoint holds the user's names and shapes whatever the mesh was, and loads on any other mesh,
or on a single device.

The pieces share storage with the parameter, so a checkpoint is written from it and read into it without a
copy. It is a tensor in name, shape and dtype only: `full_tensor()` is what computes with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from tedfx import _torch

_aten = torch.ops.aten
# What checkpointing does to a tensor, piece by piece.
_PIECEWISE = {
    _aten.detach.default,
    _aten.clone.default,
    _aten._to_copy.default,
    _aten.empty_like.default,
    _aten.zeros_like.default,
    _aten.copy_.default,
    _aten.alias.default,
    _aten.zero_.default,
    _aten.is_pinned.default,
}


class _Place:
    """Mesh and axes. One object, shared by copies: a mesh stands for process groups and is not copied with a
    tensor."""

    def __init__(self, mesh, shard_axes):
        self.mesh, self.shard_axes = mesh, tuple(shard_axes)

    def __deepcopy__(self, memo):
        return self


class PiecedTensor(Tensor):
    """`pieces`: (offsets, tensor) boxes of a tensor of `shape` that this rank holds; none is a rank without a
    share.

    Over the axes in `shard_axes` the ranks of `mesh` hold different boxes, over the others the same.
    """

    pieces: list[tuple[tuple[int, ...], Tensor]]
    place: _Place

    @staticmethod
    def __new__(cls, shape, pieces, mesh, shard_axes, dtype, device) -> PiecedTensor:
        self = _torch.make_wrapper(cls, torch.Size(shape), dtype=dtype, device=device)
        self.pieces = [(tuple(offsets), piece) for offsets, piece in pieces]
        self.place = _Place(mesh, shard_axes)
        return self

    mesh = property(lambda self: self.place.mesh)
    shard_axes = property(lambda self: self.place.shard_axes)

    def full_tensor(self) -> Tensor:
        """The user's whole tensor, on every rank. A collective over the mesh."""
        full = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        names, coordinate = self.mesh.mesh_dim_names, self.mesh.get_coordinate()
        if all(index == 0 for axis, index in zip(names, coordinate) if axis not in self.shard_axes):
            for box, (_, piece) in zip(self._boxes(), self.pieces):
                full[box] = piece
        for axis in names:  # every element has one contributor: the sum is exact
            if self.mesh.get_group(axis).size() > 1:
                dist.all_reduce(full, group=self.mesh.get_group(axis))
        return full

    def copy_pieces_(self, source: PiecedTensor | Tensor) -> None:
        """Fill the pieces from a full tensor, or from a PiecedTensor with the same boxes."""
        if isinstance(source, PiecedTensor):
            if [o for o, _ in source.pieces] != [o for o, _ in self.pieces]:
                source = source.full_tensor()
            else:
                for (_, mine), (_, theirs) in zip(self.pieces, source.pieces):
                    mine.copy_(theirs)
                return
        for box, (_, piece) in zip(self._boxes(), self.pieces):
            piece.copy_(source[box])

    def _boxes(self) -> list[tuple[slice, ...]]:
        return [
            tuple(slice(o, o + n) for o, n in zip(offsets, piece.shape)) for offsets, piece in self.pieces
        ]

    def _with(self, pieces: Sequence[Tensor], dtype, device) -> PiecedTensor:
        offsets = [o for o, _ in self.pieces]
        return PiecedTensor(self.shape, zip(offsets, pieces), self.mesh, self.shard_axes, dtype, device)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (
            func is _aten.new_empty.default
        ):  # asynchronous checkpointing: an empty shell, its attributes are copied after
            self, size = args[:2]
            return PiecedTensor(
                size,
                [],
                self.mesh,
                self.shard_axes,
                kwargs.get("dtype") or self.dtype,
                kwargs.get("device") or self.device,
            )
        if func not in _PIECEWISE:
            raise NotImplementedError(f"{func} on a tensor held in pieces; use .full_tensor()")
        self = args[0]
        if func is _aten.copy_.default:
            self.copy_pieces_(args[1])
            return self
        results = []
        for index in range(len(self.pieces)):
            pick = lambda x: x.pieces[index][1]  # noqa: B023, E731
            results.append(
                func(
                    *_torch.pytree.tree_map_only(PiecedTensor, pick, args),
                    **_torch.pytree.tree_map_only(PiecedTensor, pick, kwargs),
                )
            )
        if func is _aten.is_pinned.default:
            return all(results)
        if func is _aten.zero_.default:
            return self
        dtype = kwargs.get("dtype") or self.dtype
        device = kwargs.get("device") or self.device
        return self._with(results, dtype, torch.device(device))

    def __repr__(self, *, tensor_contents=None) -> str:
        boxes = [tuple(f"{b.start}:{b.stop}" for b in box) for box in self._boxes()]
        return (
            f"PiecedTensor(shape={tuple(self.shape)}, dtype={self.dtype}, axes={self.shard_axes}, "
            f"here={boxes})"
        )

    # ---- what torch.distributed.checkpoint asks ------------------------------------------------------------

    def _chunk(self, offsets, piece) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=piece.shape)

    def __create_write_items__(self, fqn: str, object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=self._chunk(offsets, piece),
                    properties=TensorProperties.create_from_tensor(piece),
                    size=self.shape,
                ),
            )
            for offsets, piece in self.pieces
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk(offsets, piece) for offsets, piece in self.pieces]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for offsets, piece in self.pieces:
            if index.offset is None or torch.Size(offsets) == index.offset:
                return piece
        raise ValueError(f"{index.fqn}: this rank holds no piece at offset {tuple(index.offset or ())}")

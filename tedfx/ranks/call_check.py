"""Agreement between ranks on a call, before any of its collectives.

A call exchanges one fixed-size fingerprint on a CPU (gloo) group of its own: a number for what is called
(arguments, types, flags, shapes), one for inputs that every rank must share (scalars, and what has no batch
dim), one for the data. Ranks that stand at the same batch coordinate must have the same data. Where
fingerprints differ, every rank sees it and takes part in a second exchange of the texts behind the numbers,
so that the message can say who has what.

A call that some rank has no program for is compiled after a first exchange and compared again in a second, so
that an error in one rank's compilation is seen too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from tedfx.dtypes import as_real, has_gradient
from tedfx.ranks.failures import RanksDisagree
from tedfx.ranks.meeting import AFTER_COMPILING, Meeting, fingerprint
from tedfx.ranks.wording import by_value, ranks_text

# Elements of one tensor that its checksum reads; of a longer one, every k-th.
CHECKSUM_ELEMENTS = 2**20


class CallCheck:
    """Before any collective of a forward: all ranks made the same call, with the data that belongs to their
    coordinate."""

    def __init__(self, meeting: Meeting, batch_axes: Sequence[str]):
        self.meeting, self._patience = meeting, 1
        mesh = meeting.mesh
        batch = [mesh.mesh_dim_names.index(axis) for axis in batch_axes]
        self._coordinate = {}
        for place in (
            torch.cartesian_prod(*(torch.arange(n) for n in mesh.mesh.shape))
            .reshape(-1, mesh.mesh.dim())
            .tolist()
        ):
            self._coordinate[int(mesh.mesh[tuple(place)])] = tuple(place[dim] for dim in batch)

    def __call__(
        self,
        signature: str,
        tensors: Mapping[str, Tensor],
        program: bool = True,
        shared: Collection[str] = (),
        data: tuple[int, int] | None = None,
    ) -> bool:
        """Whether some rank has no program for the call yet; then nothing but the call was compared.

        program: whether this rank has one. shared: inputs without a batch dim, apart from scalars. data: the
        `checksums` of the tensors, where they are known.
        """
        if self.meeting.alone:
            return not program
        call = (
            signature + " with " + ", ".join(f"{key} {_kind(t)}{list(t.shape)}" for key, t in tensors.items())
        )
        common, mine = (0, 0) if not program else checksums(tensors, shared)[:2] if data is None else data
        found = self.meeting.exchange(
            [not program, fingerprint(call), common, mine], "forward", self._patience
        )
        self._patience = 1
        if len({numbers[1] for numbers in found.values()}) > 1:
            texts = self.meeting.texts(call, "forward")
            raise RanksDisagree(
                f"forward was called differently: {by_value(texts)}. Give every rank the same "
                "arguments, the same shapes "
                "(pad, or drop the last batch) and the same train() or eval() mode"
            )
        if any(numbers[0] for numbers in found.values()):
            self._patience = AFTER_COMPILING
            return True
        if len({numbers[2] for numbers in found.values()}) > 1:
            texts = self.meeting.texts(
                ", ".join(f"{k}={_value(t)}" for k, t in tensors.items() if t.dim() == 0 or k in shared),
                "forward",
            )
            kind = "inputs without a batch dim" if shared else "scalar inputs"
            raise RanksDisagree(
                f"{kind} differ between ranks: {by_value(texts)}. They are global values: reduce them "
                "first, or give every rank the same"
            )
        rows: dict[tuple, dict[int, int]] = {}
        for rank, numbers in found.items():
            rows.setdefault(self._coordinate[rank], {})[rank] = numbers[3]
        wrong = [sorted(row) for row in rows.values() if len(set(row.values())) > 1]
        if wrong:
            raise RanksDisagree(
                f"{ranks_text(wrong[0])} have the same batch coordinate but were given different data; "
                "shard the data by pm.batch_coordinate (index, count), not by the rank"
            )
        return False


def checksums(
    tensors: Mapping[str, Tensor], shared: Collection[str] = (), also: Sequence[Tensor] = ()
) -> tuple[int, ...]:
    """(of the scalars and what is shared, of the rest, the 0-dim integers `also`): order-sensitive sums of
    the bits, one host copy. No protection against intent."""
    sums = [[], []]
    for name, tensor in tensors.items():
        bits = _bits(tensor.detach())
        step = -(-bits.numel() // CHECKSUM_ELEMENTS) or 1
        bits = bits[::step].to(torch.int64)
        weights = torch.arange(bits.numel(), device=bits.device) * 0x9E3779B1 + 0x85EBCA6B
        sums[tensor.dim() > 0 and name not in shared].append((bits * weights).sum())
    device = next((t.device for t in tensors.values()), torch.device("cpu"))
    zero = torch.zeros((), dtype=torch.int64, device=device)
    totals = [sum((s * (2 * i + 3) for i, s in enumerate(part)), zero) for part in sums]
    return tuple(torch.stack([*totals, *also]).tolist())


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    if not has_gradient(flat.dtype):
        return flat
    flat = as_real(flat).reshape(-1)
    return flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _value(tensor: Tensor) -> str:
    return (
        str(tensor.item())
        if tensor.dim() == 0
        else f"{list(tensor.shape)} with checksum {checksums({'': tensor})[1] % 2**32:08x}"
    )

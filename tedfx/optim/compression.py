"""A mean over ranks with one bit per element: what 1-bit Adam sends (arXiv 2102.02888, algorithm 1).

The tensors of a bucket are laid out as rows, one for each rank of the group: a tensor of N elements has
ceil(N / 8n) * 8 of them in each of the n rows, zeros behind the last. So every row is whole bytes of signs,
every rank serves a part of every tensor, and all rows have the same stretches. A tensor's part of a row has a
scale of its own, the mean of the absolute values: tensors of different magnitude do not share one (a scale
per fused buffer does not know them apart), it costs 4 n bytes per tensor, and it is the best multiple of the
signs in the 2-norm, so that what is left is always smaller than what was compressed (EF-SGD, arXiv
1901.09847). The root of the mean square, which keeps the norm, can leave more than there was where few
elements are large.

Algorithm of `mean` (numbers repeated in the body):

1. Worker: what is to be sent, plus what was left of the last time (the worker's error), becomes signs and
   scales; what these do not say is the new error.
2. One all-to-all: row r of every rank to rank r, signs, scales and flags in the same bytes.
3. Server: the mean of what came, plus the server's error, becomes signs and scales again, with a new server's
   error.
4. One all-gather. All ranks decode the same bytes, so the result is bitwise the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tedfx import _torch


@dataclass(frozen=True)
class Stretch:
    """`count` tensors of `numel` elements each (a stack has a scale for each of its tensors), `width`
    elements of each in a row, from `start` on."""

    count: int
    numel: int
    width: int
    start: int


class CompressedMean:
    """Means over `group` of the same tensors again and again, with the errors that are left from one time to
    the next.

    sizes          (count, numel) of each member of the bucket: a member is `count` tensors of `numel`
                   elements.
    dtype          of the values and the errors; scales travel in it.
    worker_error   [ranks, width]: of this rank's values. server_error: [1, width], of the row that this rank
                   serves. Both are zero where a row is padded.
    sent           {collective: bytes of the tensor handed to it} of the last `mean`.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        group: dist.ProcessGroup,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.group, self.ranks, self.rank, self.dtype, self.device = (
            group,
            dist.get_world_size(group),
            dist.get_rank(group),
            dtype,
            device,
        )
        self.stretches, at = [], 0
        for count, numel in sizes:
            width = -(-numel // (8 * self.ranks)) * 8
            self.stretches.append(Stretch(count, numel, width, at))
            at += count * width
        self.width, self.scales = at, sum(stretch.count for stretch in self.stretches)
        self.worker_error = torch.zeros(self.ranks, self.width, dtype=dtype, device=device)
        self.server_error = torch.zeros(1, self.width, dtype=dtype, device=device)
        self.sent: dict[str, int] = {}
        self._powers = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=device)
        # Per scale: how many bytes of a row it stands for, as the index of the scale of each byte; and how
        # many elements of each row are no padding.
        bytes_of = [stretch.width // 8 for stretch in self.stretches for _ in range(stretch.count)]
        self._scale_of = (
            torch.arange(self.scales).repeat_interleave(torch.tensor(bytes_of, dtype=torch.int64)).to(device)
        )
        real = [
            [min(max(s.numel - row * s.width, 0), s.width) for s in self.stretches for _ in range(s.count)]
            for row in range(self.ranks)
        ]
        self._real = torch.tensor(real, dtype=dtype).clamp(min=1).to(device)

    @property
    def message(self) -> int:
        """Bytes of a row: signs, scales, a flag per member."""
        return self.width // 8 + self.scales * self.dtype.itemsize + len(self.stretches)

    def mean(self, values: Sequence[Tensor], have: Sequence[bool]) -> list[Tensor | None]:
        """The mean over the ranks of each member, [count, numel]; None, on all ranks, where no rank has it,
        and its errors stay. A collective.

        values: [count, numel] each. have: whether this rank has a value of its own; if not, its `values`
        entry takes part if another rank has. Only then the host reads from the device.
        """
        missing = [index for index, mine in enumerate(have) if not mine]
        before = {
            index: (
                self._part(self.worker_error, index).clone(),
                self._part(self.server_error, index).clone(),
            )
            for index in missing
        }
        flags = torch.tensor(have, dtype=torch.uint8).to(self.device, non_blocking=True)
        outgoing = self._compress(self._rows(values), self.worker_error, range(self.ranks), flags)  # Step 1
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=self.group)  # Step 2
        parts, flags = self._expand(incoming)
        served = self._compress(
            parts.mean(0, keepdim=True), self.server_error, [self.rank], flags.amax(0)
        )  # Step 3
        gathered = served.new_empty(self.ranks, self.message)
        _torch.gather_into(gathered, served, group=self.group)  # Step 4
        self.sent = {"all_to_all": outgoing.numel(), "all_gather": gathered.numel()}
        rows, flags = self._expand(gathered)
        present = flags[0].tolist() if missing else None
        found: list[Tensor | None] = []
        for index in range(len(self.stretches)):
            if present is not None and not present[index]:
                for error, old in zip((self.worker_error, self.server_error), before[index]):
                    self._part(error, index).copy_(old)
                found.append(None)
            else:
                found.append(self._take(rows, index))
        return found

    # ---- rows ----------------------------------------------------------------------------------------------

    def _part(self, rows: Tensor, index: int) -> Tensor:
        """A member's elements of rows[r, width], as a view [r, count, width of one]."""
        s = self.stretches[index]
        return rows[:, s.start : s.start + s.count * s.width].unflatten(1, (s.count, s.width))

    def _rows(self, values: Sequence[Tensor]) -> Tensor:
        rows = torch.empty(self.ranks, self.width, dtype=self.dtype, device=self.device)
        for index, (s, value) in enumerate(zip(self.stretches, values)):
            spare = self.ranks * s.width - s.numel
            padded = torch.nn.functional.pad(value, (0, spare)) if spare else value
            self._part(rows, index).copy_(padded.view(s.count, self.ranks, s.width).transpose(0, 1))
        return rows

    def _take(self, rows: Tensor, index: int) -> Tensor:
        s = self.stretches[index]
        return self._part(rows, index).transpose(0, 1).reshape(s.count, self.ranks * s.width)[:, : s.numel]

    def _clear(self, rows: Tensor, numbers: Sequence[int]) -> None:
        """Zero the padding of these rows of the layout: a sign cannot say zero, and what it says there is
        nobody's."""
        for index, s in enumerate(self.stretches):
            for at, row in enumerate(numbers):
                real = min(max(s.numel - row * s.width, 0), s.width)
                if real < s.width:
                    self._part(rows, index)[at, :, real:].zero_()

    # ---- bytes ---------------------------------------------------------------------------------------------

    def _compress(self, rows: Tensor, error: Tensor, numbers: Sequence[int], flags: Tensor) -> Tensor:
        """rows[r, width], which are the layout's rows `numbers`, and flags[members] as messages [r, message];
        `error` is taken in and replaced."""
        rows = rows.add_(error)
        self._clear(rows, numbers)
        sums = torch.cat(
            [
                torch.linalg.vector_norm(self._part(rows, index), 1, dim=-1)
                for index in range(len(self.stretches))
            ],
            1,
        )
        scales = sums / self._real[numbers[0] : numbers[0] + len(rows)]
        signs = (rows >= 0).view(len(rows), -1, 8)
        torch.sub(rows, self._signed(signs, scales), out=error)
        self._clear(error, numbers)
        packed = (signs * self._powers).sum(-1, dtype=torch.uint8)
        return torch.cat([packed, scales.view(torch.uint8), flags.expand(len(rows), -1)], 1)

    def _signed(self, signs: Tensor, scales: Tensor) -> Tensor:
        """signs[r, bytes, 8] times scales[r, scales] -> [r, width]."""
        spread = scales[:, self._scale_of].unsqueeze(-1)
        return torch.where(signs, spread, -spread).view(len(signs), self.width)

    def _expand(self, messages: Tensor) -> tuple[Tensor, Tensor]:
        """messages[r, message] -> (rows[r, width], flags[r, members])."""
        sizes = [self.width // 8, self.scales * self.dtype.itemsize, len(self.stretches)]
        packed, scales, flags = messages.split(sizes, 1)
        signs = packed.unsqueeze(-1).bitwise_and(self._powers).ne(0)
        # Flat meanwhile: where there are no scales, the strides of a matrix do not fit the wider dtype.
        scales = scales.reshape(-1).view(self.dtype).view(len(messages), self.scales)
        return self._signed(signs, scales), flags

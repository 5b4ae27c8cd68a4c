"""What the ranks of a save or a load do together: an error on one is a CheckpointError on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from tedfx.ranks.failures import lost_rank
from tedfx.saving.folder import CheckpointError

_AFTER = ("the checkpoints named before it are as they were", "nothing was changed; load another one")


class Together:
    """ranks: of the mesh, in its order; group: theirs, of gloo."""

    def __init__(self, ranks: list[int], group: dist.ProcessGroup):
        self._ranks, self._group = ranks, group

    def every(self, what: str, act: Callable[[], Any]) -> list:
        """What `act` gives on each rank, in mesh order; an error on one is a CheckpointError on all."""
        try:
            mine = (True, act())
        except Exception as error:  # told to the other ranks
            mine = (
                False,
                str(error)
                if isinstance(error, CheckpointError)
                else f"{type(error).__name__}: {line_of(error)}",
            )
        every: list[Any] = [None] * len(self._ranks)
        self.run(what, lambda: dist.all_gather_object(every, mine, group=self._group))
        failed = {rank: text for rank, (fine, text) in zip(self._ranks, every) if not fine}
        if failed:
            rank, text = next(iter(failed.items()))
            raise CheckpointError(
                text if len(failed) == len(every) else f"{text} (rank {rank}, of {len(failed)} that failed)"
            )
        return [value for _, value in every]

    def run(self, what: str, act: Callable[[], Any]) -> None:
        """A collective of torch.distributed, whose errors are one line."""
        try:
            act()
        except CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            raise CheckpointError(
                f"{what} failed on rank {self._ranks[rank]}: {type(cause).__name__}: {line_of(cause)}; "
                f"{_AFTER[what == 'load']}"
            ) from error
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{what}: {lost_rank(error) or line_of(error)}; {_AFTER[what == 'load']}"
            ) from error


def line_of(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__

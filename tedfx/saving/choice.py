"""Which checkpoint of a folder a run goes on from: the one that was asked for if it is whole; else a line
that says what is, or with a warning the newest that is."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from tedfx.saving import owner
from tedfx.saving.checksums import damage
from tedfx.saving.folder import CheckpointError, Damaged, Folder, check_finished, read_metadata


class Choice:
    """The ranks of one load, choosing. together(act): the list of what `act` gives on each rank. verify:
    files are compared with their checksums, each rank a share."""

    def __init__(self, together: Callable[[Callable[[], Any]], list], rank: int, ranks: int, verify: bool):
        self._together, self._rank, self._ranks, self._verify = together, rank, ranks, verify

    def choose(self, folder: Folder, given: str | os.PathLike, older: bool) -> tuple[Path, Metadata] | None:
        """The same on every rank: the checkpoint, examined, and what it says of itself; None where the folder
        has none yet.

        CheckpointError where it is damaged. Where only `latest` is, or with `older`, the newest whole one is
        taken and the first rank warns.
        """

        def look() -> tuple[list[Path], str, str | None]:
            return *folder.find(given), owner.other(folder.path)

        candidates, wrong, writer = self._together(lambda: look() if self._rank == 0 else None)[0]
        if writer:
            self.warn(
                f"another run writes its checkpoints to {folder.path} ({writer}): this one can load them "
                "and cannot save there"
            )
        if not candidates:
            return None
        newest, *behind = candidates
        problem = self._examine(newest)
        if isinstance(problem, Metadata):
            if wrong:
                self.warn(f"{wrong}: {newest}, the newest whole checkpoint, is taken")
            return newest, problem
        whole = [(path, found) for path in behind if isinstance(found := self._examine(path), Metadata)]
        if whole and (wrong or older):
            self.warn(
                f"{wrong + ', and ' if wrong else ''}{newest} is damaged, {problem}: {whole[0][0]}, the "
                "newest whole checkpoint, is taken"
            )
            return whole[0]
        names = ", ".join(path.name for path, _ in whole)
        rest = (
            f"whole: {names}; load({str(whole[0][0])!r}), or load(older=True)"
            if whole
            else f"no older checkpoint in {newest.parent} is whole"
        )
        raise CheckpointError(f"{newest} is damaged, {problem}; {rest}")

    def _examine(self, path: Path) -> Metadata | str:
        """What the checkpoint at `path` says of itself where it is whole, else what is wrong with it."""
        read: list[Metadata] = []

        def files() -> list[str]:
            check_finished(path)
            return damage(path, self._rank, self._ranks) if self._verify else []

        def said() -> list[str]:
            read.append(read_metadata(path))
            return []

        problems = self._problems(files) or self._problems(
            said
        )  # nothing is unpickled that is known to be damaged
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        return "; ".join(problems[:3]) + more if problems else read[0]

    def _problems(self, look: Callable[[], list[str]]) -> list[str]:
        """What the ranks found, each problem once."""

        def told() -> list[str]:
            try:
                return look()
            except Damaged as error:
                return [str(error)]

        return list(dict.fromkeys(problem for found in self._together(told) for problem in found))

    def warn(self, text: str) -> None:
        if self._rank == 0:
            warnings.warn(text, stacklevel=2)

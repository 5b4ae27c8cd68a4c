"""Save a run, and go on with it on this mesh or another.

    checkpoints = tedfx.Checkpointer("checkpoints", pm, optimizer, scheduler=schedule, extra={"data":
    generator})
    resumed = checkpoints.load()                          # the latest whole one; None where there is none yet
    for step in range(resumed.step if resumed else 0, steps):
        ...
        if (step + 1) % 100 == 0:
            checkpoints.save(step + 1, asynchronous=True)
    checkpoints.wait()

A checkpoint is one of `torch.distributed.checkpoint`, under the user's names and in the user's shapes:
`model.{name}`, `optimizer/{name}/{state}`, and `tedfx`, one small object with everything else. Each rank
writes its part, a replica is written once. So any mesh loads it, and `dcp.load({"model": model.state_dict()},
checkpoint_id=..)` the plain model. The folder must be one that all hosts see. As with torch.load, only load
what you trust.
"""

from __future__ import annotations

import datetime
import io
import os
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tedfx.ops.groups import group_among
from tedfx.saving.checksums import ALGORITHM, CHECKSUMS
from tedfx.saving.choice import Choice
from tedfx.saving.folder import CheckpointError, Folder, Writer
from tedfx.saving.host_copy import HostCopy, on_host, pieces_of
from tedfx.saving.optimizer_state import OptimizerState
from tedfx.saving.together import Together, line_of

SMALL = "tedfx"


class Resumed(NamedTuple):
    """Where the run stands: steps done, what `save` was given as `position`, and the checkpoint."""

    step: int
    position: Any
    path: Path


class Checkpointer:
    """Checkpoints of one run in `folder`. Collective over the job to construct, over the mesh to save and to
    load.

    optimizer: a torch.optim.Optimizer over pm.parameters(), or one that shards its state
    (`tedfx/saving/optimizer_state.py`). scheduler: its learning-rate scheduler. extra: {name: object} with
    state_dict() and load_state_dict(), or get_state() and set_state() (a torch.Generator): a loss scaler, a
    data loader. What they hold, and `position`, is global: the first rank's is kept, and every rank gets it.
    keep: how many checkpoints to keep. verify: at load, compare every file with its checksum first
    (`tedfx/saving/checksums.py`). timeout: seconds that ranks wait for each other while they save or load; a
    rank that ended is noticed at once.
    """

    def __init__(
        self,
        folder,
        pm,
        optimizer,
        *,
        scheduler=None,
        extra: Mapping[str, Any] | None = None,
        keep: int = 2,
        timeout: float = 1800.0,
        verify: bool = True,
    ):
        if keep < 1:
            raise CheckpointError(f"keep={keep}: at least one checkpoint must stay")
        if dist.get_backend() == "fake":
            raise CheckpointError("this is a fake world of one process: there is nothing to save")
        self._folder, self._pm, self._optimizer, self._scheduler, self._extra = (
            Folder(folder, keep),
            pm,
            optimizer,
            scheduler,
            dict(extra or {}),
        )
        self._ranks = pm.device_mesh.mesh.flatten().tolist()
        # a group of its own: an asynchronous save talks while the run does
        self._group = group_among(
            [self._ranks],
            backend="gloo",
            timeout=datetime.timedelta(seconds=timeout),
            group_desc="tedfx_checkpoints",
        )
        self._together = Together(self._ranks, self._group)
        self._first, self._pending, self._verify = dist.get_rank(self._group) == 0, None, verify

    # ---- saving --------------------------------------------------------------------------------------------

    def claim(self) -> None:
        """Make the folder this run's, as the first save does: CheckpointError while another run that lives
        writes to it. So it is known before the first step."""
        self._together.every("claim", lambda: self._folder.claim() if self._first else None)

    def save(self, step: int, position: Any = None, asynchronous: bool = False) -> None:
        """Write folder/step-{step}. Call it between an optimizer step and the next forward; gradients are not
        saved.

        position: where the data stands, any picklable object, the same for all ranks. asynchronous: return as
        soon as this rank's share is copied to host memory; the next save, load or wait() joins it and raises
        what went wrong.
        """
        self.wait()
        name = f"step-{step:08d}"

        def begin() -> tuple[int, Tensor]:
            if self._first:
                self._folder.begin(name)
            return step, torch.get_rng_state()

        begun = self._together.every(f"save of step {step}", begin)
        if len({there for there, _ in begun}) > 1:
            raise CheckpointError(
                "ranks save different steps: "
                f"{', '.join(f'rank {rank} step {there}' for rank, (there, _) in zip(self._ranks, begun))}"
            )
        state = OptimizerState(self._pm, self._optimizer)
        values = state.read()
        tensors = {"model": self._pm.state_dict(), **state.tensors(values)}
        if self._first:
            small = self._small(step, position, [generator for _, generator in begun])
            tensors[SMALL] = _pack({**small, "optimizer": state.small(values)})
        writer = Writer(self._folder, name)
        if asynchronous:
            saving = state_dict_saver.async_save(
                tensors, storage_writer=writer, process_group=self._group, async_stager=HostCopy()
            )
            assert isinstance(saving, Future), saving  # HostCopy has the copies when it returns
            self._pending = step, saving
        else:
            self._together.run(
                f"save of step {step}",
                lambda: state_dict_saver.save(tensors, storage_writer=writer, process_group=self._group),
            )

    def wait(self) -> None:
        """Until the save under way is named. A collective only in what it waits for."""
        if self._pending is not None:
            (step, future), self._pending = self._pending, None
            self._together.run(f"save of step {step}", future.result)

    def _small(self, step: int, position: Any, generators: list[Tensor]) -> dict[str, Any]:
        alike = all(torch.equal(generator, generators[0]) for generator in generators)
        return {
            "step": step,
            "position": position,
            "rng_state": tuple(self._pm.rng_state),
            "generators": generators[:1] if alike else generators,
            "mesh": self._mesh(),
            "scheduler": None if self._scheduler is None else self._scheduler.state_dict(),
            "checksums": ALGORITHM,
            "extra": {
                name: each.state_dict() if hasattr(each, "state_dict") else each.get_state()
                for name, each in self._extra.items()
            },
        }

    def _mesh(self) -> tuple:
        return tuple(zip(self._pm.device_mesh.mesh_dim_names, self._pm.device_mesh.mesh.shape))

    # ---- loading -------------------------------------------------------------------------------------------

    def load(self, path: str | os.PathLike = "auto", older: bool = False) -> Resumed | None:
        """Go on from the latest whole checkpoint of the folder ("auto"; None where there is none), or from
        `path`.

        All of it is compared with this run (keys, shapes, dtypes, groups), its files with their checksums,
        and read into host memory before anything is changed; every rank raises the same CheckpointError. One
        that is damaged is refused, and the line says which older ones are whole; `older=True` takes the
        newest of those, with a warning.
        """
        self.wait()
        # Step 1: the same one on every rank, whole, and its small object.
        choice = Choice(
            lambda act: self._together.every("load", act),
            dist.get_rank(self._group),
            len(self._ranks),
            self._verify,
        )
        chosen = choice.choose(self._folder, path, older)
        if chosen is None:
            return None
        found, metadata = chosen
        if SMALL not in metadata.state_dict_metadata:
            raise CheckpointError(
                f"{found} was not written by a Checkpointer; for its weights alone: dcp.load and "
                "pm.load_state_dict"
            )
        packed = {SMALL: b""}
        self._read(packed, found)

        # Step 2: does it fit?
        state, small, live = OptimizerState(self._pm, self._optimizer), {}, {}

        def compare():
            small.update(_unpack(packed[SMALL], found))
            if self._verify and not (found / CHECKSUMS).is_file():
                if "checksums" in small:
                    raise CheckpointError(f"{found} is damaged, {CHECKSUMS} is not there; load another one")
                choice.warn(
                    f"{found} has no checksums, it was written before there were any: damage in its "
                    "files may not be seen"
                )
            self._compare(found, small)
            saved = {
                key: entry
                for key, entry in metadata.state_dict_metadata.items()
                if isinstance(entry, TensorStorageMetadata)
            }
            live.update((f"model.{name}", entry) for name, entry in self._pm.state_dict().items())
            _fits(found, {key: entry for key, entry in saved.items() if key.startswith("model.")}, live)
            state.check(small["optimizer"])
            moments = {
                key: entry
                for key, entry in saved.items()
                if not key.startswith("model.") and state.reads(key)
            }
            targets = state.targets({key: entry.properties.dtype for key, entry in moments.items()})
            _fits(found, moments, targets)
            live.update(targets)

        self._together.every("load", compare)

        # Step 3: read beside, then copy, then everything that is small.
        staged = {key: on_host(entry, fill=False) for key, entry in live.items()}
        self._read(staged, found)
        with torch.no_grad():
            for key, entry in live.items():
                for (_, mine), (_, read_piece) in zip(pieces_of(entry), staged[key].pieces):
                    mine.copy_(read_piece)
        self._together.every("load", lambda: self._restore(state, small))
        return Resumed(small["step"], small["position"], found)

    def _read(self, entries: dict[str, Any], path: Path) -> None:
        """These keys of the checkpoint, in place."""
        read = lambda: state_dict_loader.load(entries, checkpoint_id=path, process_group=self._group)
        self._together.run("load", read)

    def _compare(self, path: Path, small: dict[str, Any]) -> None:
        if (small["scheduler"] is None) != (self._scheduler is None):
            raise CheckpointError(
                f"{path} was saved {'without' if small['scheduler'] is None else 'with'} a "
                "learning-rate scheduler: make the Checkpointer in the same way"
            )
        if small["extra"].keys() != self._extra.keys():
            raise CheckpointError(
                f"{path} holds extra={sorted(small['extra'])}, this run has {sorted(self._extra)}: make "
                "the Checkpointer in the same way"
            )

    def _restore(self, state: OptimizerState, small: dict[str, Any]) -> None:
        state.load(small["optimizer"])
        self._pm.rng_state = small["rng_state"]
        if len(small["generators"]) == 1:
            torch.set_rng_state(small["generators"][0])
        elif small["mesh"] == self._mesh():
            torch.set_rng_state(small["generators"][dist.get_rank(self._group)])
        elif self._first:
            warnings.warn(
                "the ranks' torch.get_rng_state() differed when this was saved, on another mesh: "
                "torch's own generator is left as it is",
                stacklevel=4,
            )
        if self._scheduler is not None:
            self._scheduler.load_state_dict(small["scheduler"])
        for name, each in self._extra.items():
            (each.load_state_dict if hasattr(each, "load_state_dict") else each.set_state)(
                small["extra"][name]
            )


def _fits(path: Path, saved: Mapping[str, TensorStorageMetadata], live: Mapping[str, Tensor]) -> None:
    """Every key, shape and dtype of the checkpoint against those here; all that is wrong in one line."""
    few = lambda items: ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
    missing, unexpected = [key for key in live if key not in saved], [key for key in saved if key not in live]
    both = [key for key in live if key in saved]
    shapes = [
        f"{key} {tuple(saved[key].size)}, here {tuple(live[key].shape)}"
        for key in both
        if tuple(saved[key].size) != tuple(live[key].shape)
    ]
    dtypes = [
        f"{key} {saved[key].properties.dtype}, here {live[key].dtype}"
        for key in both
        if saved[key].properties.dtype != live[key].dtype
    ]
    wrong = {"it has no": missing, "it has also": unexpected, "other shapes": shapes, "other dtypes": dtypes}
    if any(wrong.values()):
        text = "; ".join(f"{what} {few(items)}" for what, items in wrong.items() if items)
        raise CheckpointError(
            f"{path} is not of this model and optimizer: {text}. Resume with the model and the "
            "optimizer that it was saved with"
        )


def _pack(small: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(small, buffer)
    return buffer.getvalue()


def _unpack(data: bytes, path: Path) -> dict[str, Any]:
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
    except Exception as error:  # a pickle can raise anything
        raise CheckpointError(
            f"{path}: what it says of the run cannot be read ({type(error).__name__}: {line_of(error)}); "
            "load another one"
        ) from error

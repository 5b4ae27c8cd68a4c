"""ParallelModule: what one rank holds of a model and runs of it.

Parameters are DTensors under the user's own names, in a skeleton of empty modules that mirrors the user's. A
call is bound to the names of the model's forward, checked against the other ranks', and run by the program of
its signature; programs are compiled at first use and share the parameters. What leaves autograd goes through
the gradient boundary (`tedfx/runtime/gradients.py`): gradients are those of the global loss, summed once per
step.

Randomness: the ranks share one stream of seeds, from rank 0's `torch.initial_seed()` when the module is made,
advanced once per forward in training, and per forward that draws; `rng_state` reads and sets it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from tedfx._torch import pytree
from tedfx.errors import ConfigError, TedfxError
from tedfx.graph.signature import Path, Signature, bind, flatten, show
from tedfx.ops.autocast import Autocast, region
from tedfx.ops.context import RankContext
from tedfx.options import Options
from tedfx.placement.roles import Roles
from tedfx.ranks import progress
from tedfx.ranks.call_check import CallCheck
from tedfx.ranks.failures import noting
from tedfx.ranks.meeting import Meeting
from tedfx.runtime.asked import notice
from tedfx.runtime.changes import Changes
from tedfx.runtime.first_rank import broadcast_from_first, parameters_of
from tedfx.runtime.mirror import Guard
from tedfx.runtime.program import Program
from tedfx.runtime.programs import Compile, Programs, Ready
from tedfx.runtime.state_dict import StateDicts
from tedfx.state.parameters import ParameterLayout, Placed

EXPORT = "to export: model.load_state_dict(pm.gather_parameters(buffers=True)), then use the plain model"


class ParallelModule(StateDicts):
    """One rank's module. Made by `tedfx.parallelize`; collective over the job to construct.

    layouts: one per parameter (or stack of them), the same on every rank. source: the user's name -> full
    tensor. Called on the mesh's first rank only, once per tensor (per source of a stack). buffers: the user's
    names -> tensor; values of the first rank are taken. compile_program: `(signature, flat, training) ->
    Program`; `flat` maps paths to the leaves of this rank's call. batch_axes: axes over which tokens differ.
    axis_groups: tuples of axes whose process groups the programs use. input_names: the names of the model's
    forward, in order; var_keyword: whether it takes others as well. number_inputs: names whose python numbers
    are data, not constants: they enter as 0-dim tensors. non_persistent: buffers that are no part of the
    state dict. origin: the user's model; empty: whether it has no weights. roles: what the mesh's axes do.
    changes: what its programs read of the user's model, None where nothing is read. options: how gradients
    are kept and summed (`tedfx.state.parameters.Placed` has ZeRO's stage), and how programs run.
    """

    def __init__(
        self,
        layouts: Iterable[ParameterLayout],
        source: Callable[[str], Tensor],
        buffers: Mapping[str, Tensor],
        device_mesh,
        compile_program: Compile,
        batch_axes: Sequence[str],
        axis_groups: Iterable[tuple[str, ...]] = (),
        input_names: Sequence[str] = (),
        *,
        var_keyword: bool = True,
        number_inputs: Iterable[str] = (),
        non_persistent: Iterable[str] = (),
        origin: nn.Module | None = None,
        empty: bool = False,
        roles: Roles | None = None,
        changes: Changes | None = None,
        options: Options = Options(),
    ):
        # Step 1: groups, and agreement on what is about to be built.
        layouts = list(layouts)
        device, meeting = _device(device_mesh), Meeting(device_mesh, options.check_timeout)
        _agree(meeting, layouts, buffers, source if empty else None, options)
        everyone = tuple(device_mesh.mesh_dim_names)
        ranks = RankContext(device_mesh, [everyone, *map(tuple, axis_groups)])

        # Step 2: parameters and buffers of the first rank, one at a time.
        placed = {layout.name: Placed(layout, device_mesh, options.zero) for layout in layouts}
        if len(placed) != len(layouts):
            raise ConfigError("two parameter layouts have the same name")
        group = None if device_mesh.size() == 1 else ranks.group(everyone)
        non_persistent = frozenset(non_persistent)

        def first(of: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
            return lambda name: broadcast_from_first(name, of, meeting, group, device)

        absent = [name for layout in layouts for name in layout.sources or (layout.name,)] if empty else []
        absent += [name for name, tensor in buffers.items() if empty and tensor.is_meta]
        super().__init__(
            placed,
            parameters_of(placed, None if empty else first(source), source, device),
            (
                (
                    name,
                    torch.empty_like(tensor, device=device)
                    if empty and tensor.is_meta
                    else first(buffers.__getitem__)(name).clone(),
                )
                for name, tensor in buffers.items()
            ),
            non_persistent,
            device,
            ranks,
            meeting,
            options,
            origin=origin,
            absent=absent,
        )

        # Step 3: what a call needs.
        seed = meeting.exchange([torch.initial_seed() & (2**62 - 1)], "parallelize")
        self._rng_state = (seed[meeting.ranks[0]][0], 0)
        self._progress = options.progress and meeting.ranks[0] == dist.get_rank()
        self._batch_axes, self._roles = tuple(batch_axes), roles
        self._input_names, self._var_keyword = tuple(input_names), var_keyword
        self._number_inputs = frozenset(number_inputs)
        self._check = CallCheck(meeting, self._batch_axes)
        self._programs = Programs(compile_program, placed, options, self._boundary.gradient_dtype)
        self._changes = changes
        self._seal()

    def _seal(self) -> None:
        """From here on parameters and submodules are those that there are."""
        self._guard = Guard(self, {layout.name: layout.requires_grad for layout in self.layouts})
        self._sealed = True

    def allocate_anew(self) -> None:
        """Zeros in the place of all parameters and buffers, as new tensors: for who counts the memory that
        they take. The module then has weights."""
        self._sealed = False
        self._place_anew()
        self._absent.clear()
        self._seal()

    # ---- a call --------------------------------------------------------------------------------------------

    def forward(self, *args, **kwargs):
        """The model's forward on this rank's share of the global batch; the model's own output class."""
        return self._call([(args, kwargs)])[0]

    def layered(self, batches: Sequence[Mapping[str, Any] | Sequence[Any]]) -> list[Any]:
        """What forward returns for each of several micro-batches, run layer by layer: all micro-batches of a
        layer before the next (arXiv 2106.02679).

        batches: the arguments of a call each, kwargs (a dict) or args (a tuple); alike but for their tensors'
        values and sizes. Add their losses up, weighted as they are to count, and call backward once: it runs
        layer by layer too. So a step gathers each parameter once per direction (ZeRO-3) and sums each
        gradient once, where the layer's micro-batches are done; with gradients and buffers as if one call had
        followed the other. Activations of all micro-batches are kept, see `explain(micro_batches=)`.
        """
        batches = list(batches)
        if not batches:
            raise TedfxError(
                "layered() was given no micro-batch: pass the arguments of one call each, "
                "layered([{'input_ids': ..}, ..])"
            )
        return self._call(
            [((), batch) if isinstance(batch, Mapping) else (tuple(batch), {}) for batch in batches]
        )

    def _call(self, calls: list[tuple[tuple, Mapping[str, Any]]]) -> list[Any]:
        """The outputs of one call, or of several layer by layer. What a rank can refuse it refuses before the
        first collective, and the others raise its line."""
        with self._meeting.telling("forward") if self._options.check_inputs else contextlib.nullcontext():
            self.require_weights("forward")
            self._guard.check()
            flats = [self._inputs(*call) for call in calls]
            kinds = [self._signature(flat) for flat in flats]
            for i, kind in enumerate(kinds):
                if kind != kinds[0]:
                    raise TedfxError(
                        f"layered(): micro-batch {i} is another call than the first: {kind} and "
                        f"{kinds[0]}; run calls of different kinds one after another"
                    )
            known = self._programs.find(kinds[0], len(flats))
            first = None if known is not None and known.ran else kinds[0]
            with (
                self._telling(first),
                region(None, self._device.type),  # the casts of the region around the call are in the graph
            ):
                ready = self._agreed(kinds[0], flats)
        with self._telling(first), region(None, self._device.type), noting(self._meeting.ranks):
            progress.now("compile" if self._options.compile else "run")
            self._context.ensure_groups(ready.program.groups)
            outputs = self._ran(ready, kinds[0], flats)
        ready.ran = True
        return outputs

    def _telling(self, first: Signature | None):
        """A line of progress around the first call of a kind."""
        title = f"tedfx, first {'call' if self.training else 'evaluation'}"
        return progress.line(title, self._progress and first is not None)

    def _agreed(self, signature: Signature, flats: list[dict[Path, Any]]) -> Ready:
        """The program of this call, which all ranks make alike and which its inputs fit."""
        ready = self._programs.find(signature, len(flats))
        if self._compare(ready, signature, flats) or ready is None:
            ready = self._programs.make(signature, flats[0], self.training, len(flats))
            self._compare(ready, signature, flats)
        self._programs.last = signature
        return ready

    def _compare(self, ready: Ready | None, signature: Signature, flats: list[dict[Path, Any]]) -> bool:
        """Whether the call is still to be compiled, here or on another rank. Raises where it does not fit its
        program, or ranks differ."""
        which = [f"micro-batch {m}: " if len(flats) > 1 else "" for m in range(len(flats))]
        rules = ready.program.call if ready is not None else None
        if ready is not None and rules is not None:
            for flat in flats:
                rules.check_sizes(flat)
                for fit in ready.program.fits:
                    fit.check(flat)
        if not self._options.check_inputs:
            return ready is None
        tensors = {
            which[m] + show(path): leaf
            for m, flat in enumerate(flats)
            for path, leaf in flat.items()
            if isinstance(leaf, Tensor)
        }
        shared, data = set(), None
        if rules is not None:
            shared = {which[m] + show(path) for m in range(len(flats)) for path in rules.shared_inputs}
            data = rules.check_values(flats, tensors, shared, self._meeting.alone)
        return self._check(str(signature), tensors, ready is not None, shared, data)

    def _signature(self, flat: dict[Path, Any]) -> Signature:
        attributes = self._changes.now(self.training) if self._changes is not None else ()
        return Signature.of(
            flat, self.training, torch.is_grad_enabled(), Autocast.around(self._device.type), attributes
        )

    def _ran(self, ready: Ready, signature: Signature, flats: list[dict[Path, Any]]) -> list[Any]:
        grad, count, program = signature.grad, len(flats), ready.program
        if grad:
            self._boundary.begin(ready.order)
        operands = [
            *self._boundary.leaves(program.parameters),
            *(self.get_buffer(name) for name in program.buffers),
            *program.constants,
        ]
        for m, flat in enumerate(flats):
            operands += [flat[path] for path in program.input_keys]
            if program.uses_seed:
                # full, not tensor: a copy from the host waits for what the device has queued
                operands.append(torch.full((), self._seed(m), dtype=torch.int64, device=self._device))
        outputs = ready.run(operands, grad, self._context, self._boundary, self._options)
        if self.training or program.uses_seed:
            self._rng_state = (self._rng_state[0], self._rng_state[1] + count)
        written = len(program.mutated_buffers)
        with torch.no_grad():
            for name, value in zip(program.mutated_buffers, outputs):
                self.get_buffer(name).copy_(value)
        if grad:
            outputs = [
                *outputs[:written],
                *notice(outputs[written:], list(self.parameters()), operands[: len(program.parameters)]),
            ]
        leaves = program.out_spec.num_leaves
        return [
            pytree.tree_unflatten(
                outputs[written + m * leaves : written + (m + 1) * leaves], program.out_spec
            )
            for m in range(count)
        ]

    def _inputs(self, args, kwargs) -> dict[Path, Any]:
        call = bind(args, kwargs, self._input_names, self._var_keyword)
        if call.pop("use_cache", False):
            raise TedfxError(
                f"use_cache=True: key-value caches are not supported by a ParallelModule; {EXPORT}"
            )
        if "past_key_values" in call:
            raise TedfxError(
                f"past_key_values: key-value caches are not supported by a ParallelModule; {EXPORT}"
            )
        for name in self._number_inputs & call.keys():
            if isinstance(call[name], (int, float)) and not isinstance(call[name], bool):
                call[name] = torch.tensor(call[name], device=self._device)
        flat = flatten(call)
        for path, leaf in flat.items():
            if isinstance(leaf, Tensor) and leaf.device != self._device:
                raise TedfxError(
                    f"{show(path)} is on {leaf.device}, this rank's module on {self._device}: move it "
                    "there first"
                )
        return flat

    def make_ready(self, call: Mapping[str, Any], training: bool, around: Autocast | None = None) -> None:
        """Compile the program of a call (arguments by name) ahead of it, with gradients and the attributes of
        the model as it is. Collective over the mesh."""
        flat = flatten(call)
        signature = Signature.of(flat, training, True, around)
        ready = self._programs.make(signature, flat, training)
        self._programs.last = signature
        self._context.ensure_groups(ready.program.groups)

    def _twin(self) -> nn.Module | None:
        return self._origin[0] if self.__dict__.get("_sealed") else None

    def _reads(self, name: str) -> bool:
        return self._asks(("", name))

    def _asks(self, place: tuple[str, ...]) -> bool:
        return self._changes is not None and self._changes.asks(place)

    @property
    def trained(self) -> bool:
        """Whether a forward with gradients ran."""
        return bool(self._boundary.used)

    def _seed(self, ahead: int = 0) -> int:
        base, step = self._rng_state
        return (base * 0x9E3779B97F4A7C15 + step + ahead) & (2**63 - 1)

    def no_sync(self):
        """`with pm.no_sync(): loss.backward()` accumulates without communication; see
        `tedfx/runtime/gradients.py`."""
        return self._boundary.no_sync()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; gradients that an optimizer has taken to the host go too."""
        super().zero_grad(set_to_none)
        self._boundary.leaving.drop(zero=not set_to_none)

    def set_requires_gradient_sync(self, requires_gradient_sync: bool) -> None:
        """Whether backward sums gradients, from now on, as FSDP2's method of this name: False leaves `p.grad`
        as `no_sync()` does, this rank's part of a sum, `Partial` on the axes to be summed."""
        self._boundary.synced = bool(requires_gradient_sync)

    @property
    def batch_coordinate(self) -> tuple[int, int]:
        """(index, count) of this rank's share of the global batch, over the batch axes, first axis major."""
        return self._context.coordinate(self._batch_axes), self._context.size(self._batch_axes)

    @property
    def rng_state(self) -> tuple[int, int]:
        """(base seed, forwards in training so far): equal on all ranks; save and set it to resume a run."""
        return self._rng_state

    @rng_state.setter
    def rng_state(self, state: tuple[int, int]) -> None:
        self._rng_state = (int(state[0]), int(state[1]))

    @property
    def roles(self) -> Roles | None:
        """What the mesh's axes do."""
        return self._roles

    @property
    def last_signature(self) -> Signature | None:
        """Of the program that was made or called last; None before."""
        return self._programs.last

    @property
    def programs(self) -> dict[Signature, Program]:
        """{Signature: Program}, in order of first use."""
        return self._programs.by_signature()

    # ---- looking at it -------------------------------------------------------------------------------------

    @property
    def graph(self) -> fx.GraphModule:
        """The local graph of the last signature."""
        return self._programs.current().graph_module

    @property
    def graphs(self) -> dict[Signature, fx.GraphModule]:
        return {signature: program.graph_module for signature, program in self.programs.items()}

    @property
    def history(self) -> list[Any]:
        """A result per pass, of the last signature."""
        return self._programs.current().history

    @property
    def reductions(self):
        """What the last synced backward summed: a `tedfx.runtime.gradients.Reduction` per bucket, in order of
        launch."""
        return self._boundary.reductions

    def explain(self, **options):
        """The local graph as a table: see `tedfx.report.explanation`."""
        from tedfx.report.explanation import explain

        return explain(self, **options)

    def __repr__(self) -> str:
        return str(self.explain())

    def __getattr__(self, name: str):
        if name == "generate":
            raise AttributeError(
                f"generate() needs a key-value cache, which a ParallelModule has not; {EXPORT}"
            )
        if name == "push_to_hub":
            raise AttributeError(
                "a ParallelModule has no push_to_hub(): write a folder with save_pretrained(path) and "
                "upload that"
            )
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "dtype":  # as transformers has it; a model's own attribute of this name comes first
                return next(p.dtype for p in self.parameters() if p.is_floating_point())
            raise


def _agree(
    meeting: Meeting,
    layouts: list[ParameterLayout],
    buffers: Mapping[str, Tensor],
    on_meta: Callable[[str], Tensor] | None,
    options: Options,
) -> None:
    """RanksDisagree where ranks are about to build different modules. on_meta: of a model without weights,
    user's name -> tensor."""
    kinds = ["with weights"]
    if on_meta is not None:
        dtypes = [str(on_meta(name).dtype) for layout in layouts for name in layout.names[:1]]
        kinds = ["on the meta device", *dtypes]
    kinds += [f"precision {options.precision}"] * (options.precision is not None)
    shapes = [(layout, tuple(buffers)) for layout in layouts]
    meeting.agree(
        ", ".join(kinds) + " " + repr(shapes) + repr(meeting.mesh.mesh.tolist()),
        "the model",
        "Every rank must parallelize the same model on the same mesh",
    )


def _device(mesh) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


__all__ = ["ParallelModule", "Program"]

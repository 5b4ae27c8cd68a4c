"""Any elementwise torch optimizer over the parameters of a ParallelModule: sharded states, float32 masters, a
tiled update, exact clipping, loss scaling, offload.

Algorithm of `step` (numbers repeated in the body):

1. Masters follow parameters that were written to since (a loaded state dict).
2. Where it is needed (clipping, loss scaling) the norm of the global gradient: a sum of squares per rank, one
   all-reduce of one number. With a loss scale the host reads it, and where it is not finite the step is left
   out, on all ranks alike.
3. Batch by batch (`tedfx/optim/tiles.py`): gradients of the tiles are cast up, unscaled and clipped, the
   inner optimizer updates masters and states, weights are cast down into the parameter.
4. Under ZeRO's stages 1 and 2 a parameter whose tiles are done is gathered, while the next batches run
   (`tedfx/optim/gathering.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tedfx.errors import ConfigError, TedfxError
from tedfx.optim import fused
from tedfx.optim.gathering import Gathering
from tedfx.optim.norm import clip_factor, gradient_norm
from tedfx.optim.offload import check_room
from tedfx.optim.probe import check_class, elementwise, fuses, state_kinds
from tedfx.optim.scaling import LossScale
from tedfx.optim.shares import Share
from tedfx.optim.states import SavedStates
from tedfx.optim.tiles import Batch, Staging, cut
from tedfx.runtime.module import ParallelModule
from tedfx.state.parameters import local_of

TILE = 2**25
"""Elements of a tile by default.

On two H100 (benchmarks/results/zero-2xH100.jsonl) a step takes 4 % longer than with 2**27 or, at stage 0,
without tiles, and 0.13 GiB beyond what is stored; 2**23 costs 16 %.
"""

HOST_TILE = 2**22
"""The same where the update runs on the host.

What stays in caches, and in memory that the allocator keeps (the same record: 2**20 and 2**25 are slower).
"""

_NO_OPTIONS = {"params", "param_names"}


class ShardedOptimizer(SavedStates):
    """`ShardedOptimizer(pm, torch.optim.AdamW, lr=3e-4, max_norm=1.0)`: steps `pm` as AdamW on one device
    would, each rank its share.

    parameters      the ParallelModule (all that require gradients), or what torch's optimizers take:
                    parameters of `module`, (name, parameter) pairs, or groups of them.
    optimizer_class a torch.optim.Optimizer class. It must update every element by itself (AdamW, Adam, SGD,
    RMSprop, Adagrad, ..), which is tried out on a few numbers.
    module          the ParallelModule, where `parameters` are not it.
    tile            elements that are updated at a time: a step's extra memory is a small multiple of that
                    (the gradient in the master dtype, and what the inner optimizer needs), not of the
                    parameters. "auto": `TILE`, or `HOST_TILE` where the update runs on the host. None: every
                    parameter as a whole, all at once, in its own shape; an optimizer that is not elementwise
                    (Muon, Adafactor) is taken then if every rank owns whole parameters.
    max_norm        clip the global gradient's 2-norm to this in every step, as torch.nn.utils.clip_grad_norm_
                    does; float("inf") only measures.
    loss_scale      for float16: "dynamic", a constant, or a `LossScale`; call
                    `optimizer.scale(loss).backward()`.
    offload         "optimizer": masters and states are on the host, where the update runs; "gradients":
                    summed gradients leave for the host, bucket by bucket while backward runs, and are brought
                    back tile by tile; "cpu": both (ZeRO-Offload, arXiv 2101.06840). Gradients that have left
                    are not in `p.grad`, which is None: clip with max_norm or `clip_grad_norm_` of this class.
                    On the host the update wants threads: see torch.set_num_threads (torchrun sets
                    OMP_NUM_THREADS to 1).
    master_dtype    parameters of fewer bytes per element have master weights of this dtype, of this rank's
                    share.
    options         of `optimizer_class`: lr, betas, .. (its fused step is taken where it has one and no other
                    is chosen) and, where groups are given, each group's own.

    Collective to make with offload, and to step; all ranks call alike. At ZeRO's stage 0 each rank owns all
    elements that it holds; from stage 1 on its share over the axes that gradients are summed over. It is a
    torch.optim.Optimizer: schedulers change `param_groups`, which hold the module's own parameters. `step`
    takes no closure. Raises ConfigError for what cannot be sharded.

    grad_norm       0-dim float64, of the last step (unscaled, before clipping); None if neither max_norm nor
                    loss_scale nor `clip_grad_norm_` asked for it.
    """

    def __init__(
        self,
        parameters,
        optimizer_class,
        *,
        module=None,
        tile: int | str | None = "auto",
        max_norm: float | None = None,
        loss_scale=None,
        offload: str | None = None,
        master_dtype: torch.dtype = torch.float32,
        **options,
    ):
        check_class(optimizer_class)
        given_module = isinstance(parameters, ParallelModule)
        module = parameters if given_module else module
        if not isinstance(module, ParallelModule):
            raise ConfigError(
                "ShardedOptimizer needs the ParallelModule that the parameters are of: "
                "ShardedOptimizer(groups, torch.optim.AdamW, module=pm, ..)"
            )
        if tile == "auto":
            tile = HOST_TILE if offload in ("cpu", "optimizer") else TILE
        if tile is not None and (isinstance(tile, bool) or not isinstance(tile, int) or tile < 1):
            raise ConfigError(
                f"tile={tile!r}: a number of elements, at least 1, 'auto', or None for whole parameters"
            )
        if max_norm is not None and not max_norm > 0:
            raise ConfigError(f"max_norm={max_norm!r}: a positive number, or None")
        if offload not in (None, "cpu", "optimizer", "gradients"):
            raise ConfigError(
                f'offload={offload!r}: "cpu" (gradients and optimizer), "optimizer", "gradients" or None'
            )
        if not master_dtype.is_floating_point:
            raise ConfigError(f"master_dtype={master_dtype}: a floating-point dtype")
        module.require_weights("ShardedOptimizer")
        self._module, self._class = module, optimizer_class
        self._host, self._takes = offload in ("cpu", "optimizer"), offload in ("cpu", "gradients")
        self._options = options
        defaults = self._defaults()
        if fuses(optimizer_class, options, self._device):
            self._options = {**options, "fused": True}
            defaults = self._defaults()
        self.tile, self.max_norm, self._scaler, self._master_dtype = (
            tile,
            max_norm,
            LossScale.of(loss_scale),
            master_dtype,
        )
        self._shares: dict[str, Share] = {}  # by layout name, in the order of the groups
        self._batches: list[list[Batch]] = []  # per group
        self._names = {id(module.get_parameter(name)): name for name in module.placed}
        self._staging, self.grad_norm, self._clipped = Staging(), None, None
        self._promised = 0  # bytes of the host that states and gradients will take under offload
        mesh = module.device_mesh
        self._world = module.context.group(tuple(mesh.mesh_dim_names)) if mesh.size() > 1 else None
        self._gathering = Gathering(module.boundary.groups, module.device, module.boundary.bucket_bytes)

        super().__init__(
            [p for p in module.parameters() if p.requires_grad] if given_module else parameters, defaults
        )

    def _defaults(self) -> dict[str, Any]:
        try:
            return dict(self._class([torch.zeros(2, 2, device=self._device)], **self._options).defaults)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{self._class.__name__}: {error}") from error

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu") if self._host else self._module.device

    # ---- groups --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's: {"params": parameters of the module, and options of their own}."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            shares = self._make(group)
        except BaseException:
            self.param_groups.pop()
            raise
        self._shares.update((share.name, share) for share in shares)
        if self._takes:
            self._module.boundary.leaving.to(self, [share.name for share in shares])
        self._batches.append([Batch(tiles, self._inner(group)) for tiles in cut(shares, self.tile)])

    def _make(self, group: Mapping[str, Any]) -> list[Share]:
        names = []
        for index, parameter in enumerate(group["params"]):
            if id(parameter) not in self._names:
                raise ConfigError(
                    f"parameter {index} of group {len(self.param_groups) - 1}, of shape "
                    f"{tuple(parameter.shape)}, is not the module's: pass parameters of the "
                    "ParallelModule"
                )
            names.append(self._names[id(parameter)])
            if parameter.is_complex():
                raise ConfigError(
                    f"parameter {names[-1]} is {parameter.dtype}, and shares of an optimizer's state "
                    f"are of real numbers: use {self._class.__name__} itself, or hold it as a real "
                    "parameter of shape (.., 2) and use torch.view_as_complex(..)"
                )
        placed, problem = self._module.placed, elementwise(self._inner(group), self._device)
        for name in names if problem else ():
            share, layout = placed[name].share, placed[name].layout
            if self.tile is not None:
                raise ConfigError(
                    f"{self._class.__name__} is not elementwise ({problem}): its parameters cannot be "
                    "tiled; tile=None takes it where every rank owns whole parameters"
                )
            if layout.sources or tuple(share.shape) != layout.shape:
                raise ConfigError(
                    f"{self._class.__name__} is not elementwise ({problem}), and {name} {layout.shape} "
                    f"is {'a stack' if layout.sources else f'cut to {tuple(share.shape)} on this rank'}"
                )
        if self._host:
            kinds = (
                state_kinds(self._inner(group), "cpu", torch.float32)
                if not problem
                else {"unknown": torch.zeros(2, 64)}
            )
            states = sum(isinstance(value, Tensor) and value.dim() > 0 for value in kinds.values())
            sizes = [(placed[name].share.numel, self._module.get_parameter(name).dtype) for name in names]
            self._promised = check_room(
                sizes, self._master_dtype, states, self._world, self._module.device, self._promised
            )
        return [
            Share(name, placed[name], self._module.get_parameter(name), self._master_dtype, self._host)
            for name in names
        ]

    def _inner(self, group: Mapping[str, Any]):
        """[tensors] -> an inner optimizer with the group's options as they are when it is made."""
        return lambda tensors: self._class(
            [{"params": tensors, **{key: group[key] for key in self.defaults}}], **self._options
        )

    def _current(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in group.items() if key not in _NO_OPTIONS}

    # ---- a step --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update the parameters from their gradients. Parameters without a gradient are skipped, as torch
        does. Collective."""
        if closure is not None:
            raise TedfxError(
                "step(closure): the closure would run forward and backward inside the step; call them "
                "before it and step() without one"
            )
        self.follow_parameters()  # Step 1
        grads = self._gradients()
        self.grad_norm, self._clipped = self._clipped, None
        factor = None
        if self.max_norm is not None or self._scaler is not None:  # Step 2
            norm = self._norm(grads)
            scale = 1.0 if self._scaler is None else self._scaler.scale
            unscaled = self.grad_norm = norm if self._scaler is None else norm / scale
            if self._scaler is not None:
                finite = bool(torch.isfinite(norm))
                self._scaler.update(finite)
                if not finite:
                    return
            if self.max_norm is not None:
                factor = clip_factor(unscaled, self.max_norm) / scale
            elif scale != 1:
                factor = torch.tensor(1 / scale, dtype=torch.float64, device=self._module.device)
        factor = factor.to(self._device) if factor is not None else None

        for group, batches in zip(self.param_groups, self._batches):
            options = self._current(group)
            for run, by_kernel in fused.runs(batches, grads, options):  # Step 3
                if by_kernel:
                    fused.step(run, options, grads, factor, self._staging)
                else:
                    run[0].step(options, grads, factor, self._staging)
                for share in (share for batch in run for share in batch.finishing):
                    if share.name in grads:
                        self._gathering.add(share)  # Step 4
        self._settle()

    def _settle(self) -> None:
        """Every parameter is whole; what was written is remembered as our own."""
        self._gathering.finish()
        for name, share in self._shares.items():
            share.seen = share.version()
            if share.homes and share.parameter not in self.state and not share.tiles[0].provisional:
                self.state[share.parameter] = self._held(share)

    def _gradients(self) -> dict[str, Tensor]:
        grads = {name: share.gradient() for name, share in self._shares.items()}
        return {name: grad for name, grad in grads.items() if grad is not None}

    def _norm(self, grads: Mapping[str, Tensor]) -> Tensor:
        return gradient_norm(
            ((self._shares[name], grad) for name, grad in grads.items()),
            self._world,
            self._module.device,
            self.tile,
        )

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradients in place so that the global norm is at most `max_norm`; the norm before that,
        0-dim. Under a loss scale both are of the unscaled gradient. Collective."""
        grads, scale = self._gradients(), self._scaler.scale if self._scaler is not None else 1.0
        norm = self._norm(grads) / scale
        factor = clip_factor(norm, max_norm)
        for name in grads:
            share = self._shares[name]
            left = share.parameter.grad
            for grad in (local_of(left) if left is not None else None, share.taken()):
                if grad is not None:
                    grad.mul_(factor.to(grad.device))
        self._clipped = norm
        return norm

    # ---- loss scaling, offload -----------------------------------------------------------------------------

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the loss scale, to call backward on; a 0-dim float16 loss becomes float32. Without a
        loss scale, the loss itself."""
        return (
            loss
            if self._scaler is None
            else loss * torch.tensor(self._scaler.scale, dtype=torch.float32, device=loss.device)
        )

    kind = property(
        lambda self: self._class.__name__,
        doc="The class that updates: checkpoints of the same class fit, sharded or not.",
    )
    loss_scale = property(
        lambda self: 1.0 if self._scaler is None else self._scaler.scale,
        doc="What `scale` multiplies by now.",
    )
    skipped = property(
        lambda self: 0 if self._scaler is None else self._scaler.skipped,
        doc="Steps left out so far, for a gradient that was not finite.",
    )

    # What `tedfx/runtime/leaving.py` asks of who takes gradients.

    def take(self, name: str, value: Tensor) -> None:
        self._shares[name].take(value)

    def taken(self, name: str) -> Tensor | None:
        return self._shares[name].taken()

    def drop(self, name: str, zero: bool) -> None:
        self._shares[name].drop(zero)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; gradients on the host go too."""
        super().zero_grad(set_to_none)
        for share in self._shares.values():
            share.drop(zero=not set_to_none)

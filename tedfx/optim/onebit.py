"""1-bit Adam (arXiv 2102.02888, algorithm 1): AdamW while the variance settles, then momentum that travels
with one bit per element.

Algorithm of `step` (numbers repeated in the body):

1. Warm-up, the first `warmup_steps` steps: AdamW as torch has it, on gradients that the gradient boundary has
   summed.
2. At its end the variance is frozen, bias-corrected, and backward is told to sum nothing from now on
   (`pm.set_requires_gradient_sync(False)`): `p.grad` is this rank's part of a sum.
3. After that, each rank's momentum is m_i = beta1 m + (1 - beta1) n g_i, n the ranks of the group: gradients
   are sums here, never means, so the mean of the m_i is the momentum of the summed gradient.
   `tedfx/optim/compression.py` takes that mean over the parameter's own `reduce_axes`, bucket by bucket, with
   error feedback on both sides; m becomes the same on all ranks, bit by bit.
4. w <- w - lr (m / (1 - beta1^t) / (sqrt(v) + eps) + weight_decay w), with the frozen v.

What is compressed is the momentum in units of its frozen denominator, m / (sqrt(v) + eps): the same on all
ranks, so the mean is that of the momenta. A sign says the same magnitude for every element of a tensor; where
v is small that magnitude, divided by sqrt(v), would be a step without bound, which the paper has to mask by
hand. In these units it is a step of the size of Adam's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tedfx.errors import ConfigError, TedfxError
from tedfx.optim.compression import CompressedMean
from tedfx.optim.onebit_state import OneBitState
from tedfx.optim.onebit_step import shapes_of
from tedfx.optim.shares import Share
from tedfx.optim.volume import Volume, reduced, uncompressed
from tedfx.runtime.module import ParallelModule

BUCKET = 2**25
"""Elements that are exchanged together by default: 4 MiB of signs. Not tuned."""


class OneBitAdam(OneBitState):
    """`OneBitAdam(pm, lr=3e-4, warmup_steps=1000)`: AdamW for the warm-up, then with a sixteenth of the bytes
    of 16-bit gradients.

    parameters      the ParallelModule (all that require gradients), or what torch's optimizers take:
                    parameters of `module`, (name, parameter) pairs, or groups of them.
    warmup_steps    steps of AdamW, at least 1, over which the variance must settle; the paper takes 15 to 25
                    % of a run.
    module          the ParallelModule, where `parameters` are not it.
    lr, betas, eps, weight_decay   as of torch.optim.AdamW (decoupled weight decay); numbers, which groups may
                                   have of their own and schedulers may change.
    bucket          elements that are exchanged together.

    Bias correction: as AdamW in the warm-up. Then the momentum's goes on and the variance's stays what it was
    at the freeze, so that no step is larger for the change of phase (the paper and DeepSpeed correct nothing,
    in either phase). Frozen variances of zero (elements without a gradient so far) become the mean of the
    tensor's others, an expert's those of its stack. A parameter all of whose variances are zero on some rank
    has nothing to go by: its gradients are summed as they are and AdamW goes on. So it does for a parameter
    that is summed over no axes, which needs no collective.

    16-bit parameters have float32 masters. All ranks call alike; a parameter without a gradient on this rank
    takes part with zeros, one without a gradient on any rank is skipped, as in torch. Not offered: ZeRO (zero
    >= 1: a share's momentum is on one rank), loss scaling, clipping after the warm-up (`clip_grad_norm_`).
    Raises ConfigError for what cannot be.

    compressed      whether the warm-up is over.
    volume          a `Volume`: what was sent.
    """

    def __init__(
        self,
        parameters,
        *,
        warmup_steps: int,
        module=None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        bucket: int = BUCKET,
    ):
        given_module = isinstance(parameters, ParallelModule)
        module = parameters if given_module else module
        if not isinstance(module, ParallelModule):
            raise ConfigError(
                "OneBitAdam needs the ParallelModule that the parameters are of: OneBitAdam(groups, "
                "module=pm, ..)"
            )
        if any(placed.stage for placed in module.placed.values()):
            raise ConfigError(
                "OneBitAdam on zero >= 1: a rank there has the gradient and the momentum of its share "
                "only, so there is no sum of momenta to compress; use zero=0, or ShardedOptimizer"
            )
        for name, value in {"warmup_steps": warmup_steps, "bucket": bucket}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r}: a whole number, at least 1")
        module.require_weights("OneBitAdam")
        self._module, self.warmup_steps, self._bucket = module, warmup_steps, bucket
        self.steps, self.volume = 0, Volume()
        self._shares: dict[str, Share] = {}  # by layout name, in the order of the groups
        self._names = {id(module.get_parameter(name)): name for name in module.placed}
        self._exact: list[str] = []  # after the warm-up: parameters that go on with summed gradients
        self._exchanges: list[tuple[CompressedMean, list[Share]]] = []
        super().__init__(
            [p for p in module.parameters() if p.requires_grad] if given_module else parameters,
            dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay),
        )
        module.set_requires_gradient_sync(True)

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, before the warm-up is over: {"params": parameters of the module, and options of their
        own}."""
        if self.compressed:
            raise ConfigError(
                "add_param_group after the warm-up: the new parameters would have no variance to "
                "freeze; make all groups before"
            )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except ConfigError:
            self.param_groups.pop()
            raise
        for parameter in group["params"]:
            name = self._names[id(parameter)]
            share = self._shares[name] = Share(
                name, self._module.placed[name], parameter, torch.float32, host=False
            )
            share.homes = {
                key: torch.zeros(share.numel, dtype=share.dtype, device=share.device)
                for key in ("exp_avg", "exp_avg_sq")
            }
            master = {"master": share.dtensor(share.master)} if share.master is not None else {}
            self.state[parameter] = {
                "step": torch.tensor(0.0),
                **{key: share.dtensor(value) for key, value in share.homes.items()},
                **master,
            }

    def _check_group(self, group: dict[str, Any]) -> None:
        for index, parameter in enumerate(group["params"]):
            if id(parameter) not in self._names:
                raise ConfigError(
                    f"parameter {index} of group {len(self.param_groups) - 1}, of shape "
                    f"{tuple(parameter.shape)}, is not the module's: pass parameters of the "
                    "ParallelModule"
                )
        numbers = {
            "lr": group["lr"],
            "beta1": group["betas"][0],
            "beta2": group["betas"][1],
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
        }
        for key, value in numbers.items():
            if isinstance(value, Tensor) or not 0 <= value or (key.startswith("beta") and value >= 1):
                raise ConfigError(
                    f"{key}={value!r}: a number, at least 0"
                    + (" and below 1" if key.startswith("beta") else "")
                )

    @property
    def compressed(self) -> bool:
        return self.steps >= self.warmup_steps

    kind = property(lambda self: type(self).__name__, doc="Checkpoints of the same kind fit.")

    # ---- a step --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update the parameters from their gradients. Collective; copies nothing to the host, except where a
        parameter has no gradient here."""
        if closure is not None:
            raise TedfxError(
                "step(closure): the closure would run forward and backward inside the step; call them "
                "before it and step() without one"
            )
        grads = {
            name: self._local(share) if self.compressed and share.placed.reduce_axes else share.gradient()
            for name, share in self._shares.items()
        }
        for share in self._shares.values():
            share.follow(max(share.numel, 1))
        sent, boundary = 0.0, self._module.boundary
        if not self.compressed:  # Step 1
            sent = reduced(boundary)
            for share, group in self._each():
                if (grad := grads[share.name]) is not None:
                    self._adamw(share, grad, group)
        else:
            groups = {share.name: group for share, group in self._each()}
            sent += self._sum_exact(grads)
            for share in self._shares.values():
                alone = not share.placed.reduce_axes or share.name in self._exact
                if alone and (grad := grads[share.name]) is not None:
                    self._adamw(share, grad, groups[share.name])
            for exchange, shares in self._exchanges:
                sent += self._exchange(exchange, shares, grads, groups)
        self.volume = self.volume.after(sent, uncompressed(boundary, self._shares.values()))
        self.steps += 1
        for share in self._shares.values():
            share.seen = share.version()
        if self.steps == self.warmup_steps:
            self._freeze()

    # ---- the freeze ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _freeze(self) -> None:
        """Step 2. Once in a run: one all-reduce of a number per parameter, which the host reads."""
        summed = [share for share in self._shares.values() if share.placed.reduce_axes]
        blank = (
            torch.stack([_blank(share.homes["exp_avg_sq"]) for share in summed])
            if summed
            else torch.zeros(0, dtype=torch.int32)
        )
        if (
            summed and self._module.device_mesh.size() > 1
        ):  # alike on all ranks, also of other shards: buckets are of equal content
            dist.all_reduce(
                blank,
                op=dist.ReduceOp.MAX,
                group=self._module.context.group(tuple(self._module.device_mesh.mesh_dim_names)),
            )
        groups = {share.name: group for share, group in self._each()}
        exact = [share.name for share, empty in zip(summed, blank.tolist()) if empty]
        for share in summed:
            if share.name not in exact:
                variance = share.homes["exp_avg_sq"]
                variance.div_(
                    1 - groups[share.name]["betas"][1] ** float(self.state[share.parameter]["step"])
                )
                variance.copy_(torch.where(variance > 0, variance, variance.sum() / (variance > 0).sum()))
        self._compress(exact, self._make_exchanges(exact))

    def _make_exchanges(self, exact: Iterable[str]) -> list[tuple[CompressedMean, list[Share]]]:
        """Buckets of at most `bucket` elements, or of one parameter, of equal axes and dtype, in the order of
        the groups."""
        kinds: dict[tuple, list[list[Share]]] = {}
        for share in self._shares.values():
            if share.placed.reduce_axes and share.name not in exact:
                buckets = kinds.setdefault((share.placed.reduce_axes, share.dtype), [[]])
                if buckets[-1] and sum(other.numel for other in buckets[-1]) + share.numel > self._bucket:
                    buckets.append([])
                buckets[-1].append(share)
        groups, device = self._module.boundary.groups, self._module.device
        return [
            (CompressedMean([shapes_of(share) for share in shares], groups[axes], dtype, device), shares)
            for (axes, dtype), buckets in kinds.items()
            for shares in buckets
        ]

    def _compress(self, exact: list[str], exchanges: list[tuple[CompressedMean, list[Share]]]) -> None:
        self._exact, self._exchanges = list(exact), exchanges
        self._module.set_requires_gradient_sync(not self.compressed)

    # ---- clipping ------------------------------------------------------------------------------------------

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """In the warm-up, torch.nn.utils.clip_grad_norm_. After it TedfxError: no rank has the global
        gradient, whose norm is not that of the ranks' parts, and to sum it would cost what is saved."""
        if self.compressed:
            raise TedfxError(
                "clip_grad_norm_ after the warm-up of 1-bit Adam: no rank has the global gradient then; "
                "call it while not optimizer.compressed"
            )
        return torch.nn.utils.clip_grad_norm_(list(self._module.parameters()), max_norm)


def _blank(variance: Tensor) -> Tensor:
    """1 where a variance has nothing to go by. An empty piece, of experts that another rank has, says
    nothing."""
    return (variance.amax() == 0).int() if variance.numel() else variance.new_zeros((), dtype=torch.int32)

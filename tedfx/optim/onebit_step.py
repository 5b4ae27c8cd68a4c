"""What a step of 1-bit Adam does to parameters: AdamW's update, and that of an exchanged momentum."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tedfx.errors import TedfxError
from tedfx.optim.compression import CompressedMean
from tedfx.optim.shares import Share
from tedfx.optim.volume import gradient_dtype, ring_bytes
from tedfx.runtime.module import ParallelModule


class OneBitSteps(torch.optim.Optimizer):
    """Base of OneBitAdam, which makes what is declared here."""

    _module: ParallelModule
    _shares: dict[str, Share]  # by layout name, in the order of the groups
    _names: dict[int, str]  # id of a parameter -> layout name
    _exact: list[str]  # after the warm-up: parameters that go on with summed gradients

    def _each(self) -> Iterable[tuple[Share, dict[str, Any]]]:
        for group in self.param_groups:
            for parameter in group["params"]:
                yield self._shares[self._names[id(parameter)]], group

    def _adamw(self, share: Share, grad: Tensor, group: dict[str, Any]) -> None:
        """torch.optim.AdamW's step. grad: [numel], the whole sum."""
        (beta1, beta2), state = group["betas"], self.state[share.parameter]
        state["step"] += 1
        step, grad = float(state["step"]), grad.to(share.dtype)
        mean, variance, weights = share.homes["exp_avg"], share.homes["exp_avg_sq"], self._weights(share)
        mean.lerp_(grad, 1 - beta1)
        variance.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = variance.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
        weights.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(
            mean, denominator, value=-group["lr"] / (1 - beta1**step)
        )
        self._written(share)

    def _exchange(
        self,
        exchange: CompressedMean,
        shares: list[Share],
        grads: dict[str, Tensor | None],
        groups: dict[str, dict],
    ) -> float:
        """Steps 3 and 4 for a bucket; bytes sent."""
        values, denominators = [], []
        for share in shares:
            group, grad, mean = groups[share.name], grads[share.name], share.homes["exp_avg"]
            beta1 = group["betas"][0]
            mine = mean * beta1
            if grad is not None:
                mine.add_(grad.to(share.dtype), alpha=(1 - beta1) * exchange.ranks)
            denominators.append(share.homes["exp_avg_sq"].sqrt().add_(group["eps"]))
            values.append(mine.div_(denominators[-1]).view(shapes_of(share)))
        found = exchange.mean(values, [grads[share.name] is not None for share in shares])
        for share, update, denominator in zip(shares, found, denominators):
            if update is None:
                continue
            group, state, update = groups[share.name], self.state[share.parameter], update.reshape(-1)
            state["step"] += 1
            torch.mul(update, denominator, out=share.homes["exp_avg"])
            correction = 1 - group["betas"][0] ** float(state["step"])
            self._weights(share).mul_(1 - group["lr"] * group["weight_decay"]).add_(
                update, alpha=-group["lr"] / correction
            )
            self._written(share)
        return sum(ring_bytes(collective, size, exchange.ranks) for collective, size in exchange.sent.items())

    def _sum_exact(self, grads: dict[str, Tensor | None]) -> float:
        """Sum the gradients that are not compressed, one all-reduce per set of axes and dtype, and put the
        sums into `grads`; bytes sent."""
        sent, kinds = 0.0, {}
        for name in self._exact:
            if name in self._module.boundary.used:  # else no program uses it, on any rank
                share = self._shares[name]
                kinds.setdefault(
                    (share.placed.reduce_axes, gradient_dtype(self._module.boundary, share)), []
                ).append(share)
        for (axes, dtype), shares in kinds.items():
            group, mine = self._module.boundary.groups[axes], [grads[share.name] for share in shares]
            have = [grad is not None for grad in mine]
            parts = [
                torch.zeros(share.numel, dtype=dtype, device=share.device) if grad is None else grad.to(dtype)
                for share, grad in zip(shares, mine)
            ]
            flat = torch.cat([*parts, torch.tensor(have, dtype=dtype).to(parts[0].device, non_blocking=True)])
            dist.all_reduce(flat, group=group)
            *sums, counts = flat.split([*(share.numel for share in shares), len(shares)])
            present = [True] * len(shares) if all(have) else (counts > 0).tolist()
            grads.update(
                (share.name, value if there else None) for share, value, there in zip(shares, sums, present)
            )
            sent += ring_bytes("all_reduce", flat.nbytes, dist.get_world_size(group))
        return sent

    def _local(self, share: Share) -> Tensor | None:
        """[numel], this rank's part of the gradient's sum; None where there is none."""
        grad = share.parameter.grad
        if grad is None:
            return None
        if not isinstance(grad, DTensor):
            raise TedfxError(
                f"the gradient of {share.name} is no DTensor: gradients of a ParallelModule are those "
                "that its backward makes"
            )
        if tuple(grad.placements) != share.placed.unsynced:
            raise TedfxError(
                f"the gradient of {share.name} was summed by backward, after the warm-up: leave "
                "set_requires_gradient_sync(False) as step() set it, and call step() outside of "
                "no_sync()"
            )
        return grad.to_local().reshape(-1)

    def _weights(self, share: Share) -> Tensor:
        weights = share.master if share.master is not None else share.flat()
        assert weights is not None, share.name  # a whole parameter is one run of elements
        return weights

    def _written(self, share: Share) -> None:
        if share.master is not None:
            share.write(0, share.numel, share.master)


def shapes_of(share: Share) -> tuple[int, int]:
    """(how many of the user's tensors a parameter stacks on this rank, elements of each)."""
    shape = share.placed.local_shape
    return (shape[0], prod(shape[1:])) if share.placed.layout.sources else (1, prod(shape))

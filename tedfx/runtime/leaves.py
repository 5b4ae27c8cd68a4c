"""What autograd runs on in the place of the parameters: plain local tensors that share their storage."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from tedfx.errors import TedfxError
from tedfx.state.parameters import Placed, local_of


class Leaves:
    """The leaves of one ParallelModule, in the users' local shapes.

    placed: by layout name. parameter: returns the parameter of a name now. arrived(name, gradient): a method
    that is called with what backward brings a leaf. gradient_dtype: what several gradients of a leaf are
    added up in, by default their own.
    """

    def __init__(
        self,
        placed: Mapping[str, Placed],
        parameter: Callable[[str], nn.Parameter],
        arrived: Callable[[str, Tensor], None],
        gradient_dtype: torch.dtype | None,
    ):
        self._placed, self._parameter, self._gradient_dtype = placed, parameter, gradient_dtype
        # Weak: a tensor's hooks are no place where the garbage collector finds a cycle, and who is told holds
        # the leaves.
        self._arrived = weakref.WeakMethod(arrived)
        self._dtypes = {name: parameter(name).dtype for name in placed}
        self._leaves: dict[str, tuple[tuple, Tensor]] = {}

    def of(self, names: Iterable[str]) -> list[Tensor]:
        """The leaves of these parameters; made anew where a parameter has other storage than before."""
        with torch.inference_mode(False), torch.no_grad():
            return [self._leaf(name) for name in names]

    def _leaf(self, name: str) -> Tensor:
        parameter = self._parameter(name)
        local = local_of(parameter)
        key = (local.data_ptr(), local.dtype, local.device, local.shape, parameter.requires_grad)
        if name not in self._leaves or self._leaves[name][0] != key:
            if local.dtype != self._dtypes[name]:
                raise TedfxError(
                    f"parameter {name} has become {local.dtype}, the programs are for {self._dtypes[name]}: "
                    "convert the model before parallelize"
                )
            if not local.is_contiguous():
                raise TedfxError(
                    f"parameter {name}: its local tensor is not contiguous any more; load values with "
                    "load_state_dict or copy_"
                )
            leaf = local.view(self._placed[name].kept.shape).detach()
            if parameter.requires_grad:
                leaf.requires_grad_()
                if self._gradient_dtype is not None:  # several uses, or micro-batches, are summed in the leaf
                    leaf.grad_dtype = self._gradient_dtype
                leaf.register_post_accumulate_grad_hook(partial(_tell, self._arrived, name))
            self._leaves[name] = (key, leaf)
        return self._leaves[name][1]


def _tell(arrived: weakref.WeakMethod, name: str, leaf: Tensor) -> None:
    if leaf.grad is None:  # under ZeRO-3 autograd brings a share nothing: `tedfx/runtime/gathers.py` has it
        return
    # What is sent is the numbers themselves, not a conjugate or a negative of them.
    grad, leaf.grad = leaf.grad.detach().resolve_conj().resolve_neg(), None
    if (tell := arrived()) is not None:
        tell(name, grad)

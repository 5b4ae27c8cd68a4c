"""What a model's forward may do to autograd besides computing with tensors. torch.export records operators
only, so all of it would be lost: it is refused at its line while the model is traced.

| refused | seen as |
|---|---|
| hooks on tensors (`register_hook`, `retain_grad` and their kind) and on `grad_fn` | calls of these, reads |
| gradients in forward (`torch.autograd.grad`, `backward()`, `torch.func.grad`) | calls; torch.func's levels |
| `torch.autograd.graph.saved_tensors_hooks` | entering one, unless torch's own code packs |
| `x.data = y` | the write |

`x.data` read is `x.detach()`, and becomes that: what is then written through it is judged by
`passes/functionalize.py` as for any other tensor.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from tedfx._torch import levels_of_func
from tedfx.errors import TraceError, is_machinery

__all__ = ["refuse_side_gradients"]

_HOOKS = {
    Tensor.register_hook: "register_hook",
    Tensor.retain_grad: "retain_grad",
    Tensor.register_post_accumulate_grad_hook: "register_post_accumulate_grad_hook",
}
_GRADIENTS = {
    torch.autograd.grad: "torch.autograd.grad",
    torch.autograd.backward: "torch.autograd.backward",
    Tensor.backward: "backward()",
}
_GRAD_FN = inspect.getattr_static(Tensor, "grad_fn").__get__
_DATA, _SET_DATA = (getattr(inspect.getattr_static(Tensor, "data"), how) for how in ("__get__", "__set__"))


@contextlib.contextmanager
def refuse_side_gradients(line_of_call: Callable[[], str]) -> Iterator[None]:
    """While a model is traced: see the module's docstring. `line_of_call()` is the model's line that is
    running.
    """
    enter = saved_tensors_hooks.__enter__

    def entered(self: saved_tensors_hooks) -> None:
        if not is_machinery(_file(self.pack_hook)) or not is_machinery(_file(self.unpack_hook)):
            raise TraceError(
                "saved_tensors_hooks in forward, whose pack and unpack may change what backward reads "
                f"| at {line_of_call()} | take them out of the model"
            )
        return enter(self)

    def level() -> None:
        raise TraceError(
            f"a gradient by torch.func inside of forward | at {line_of_call()} "
            "| write the derivative out, or put it in a torch.autograd.Function"
        )

    saved_tensors_hooks.__enter__ = entered
    try:
        with _Mode(line_of_call), levels_of_func(level):
            yield
    finally:
        saved_tensors_hooks.__enter__ = enter


class _Mode(TorchFunctionMode):
    def __init__(self, line_of_call: Callable[[], str]):
        super().__init__()
        self._line = line_of_call

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in _HOOKS:
            raise TraceError(
                f"{_HOOKS[function]} on a tensor in forward, which would never run | at {self._line()} "
                "| put what it does to the gradient in a torch.autograd.Function"
            )
        if function in _GRADIENTS:
            raise TraceError(
                f"{_GRADIENTS[function]} inside of forward | at {self._line()} "
                "| write the derivative out, or put it in a torch.autograd.Function"
            )
        if function == _GRAD_FN and not is_machinery(_asker()):
            raise TraceError(
                f"grad_fn is read in forward; what is hooked there would never run | at {self._line()} "
                "| put what it does to the gradient in a torch.autograd.Function"
            )
        if function == _SET_DATA:
            raise TraceError(
                f"x.data = .. in forward, which changes a value and not its gradient | at {self._line()} "
                "| make a new tensor, or write to a buffer in place under no_grad"
            )
        if function == _DATA:
            return args[0].detach()
        return function(*args, **(kwargs or {}))


def _asker() -> str:
    """The file of the code that called what a mode is asked about; other modes may stand in between."""
    frame = sys._getframe(2)
    while frame.f_code.co_name == "__torch_function__" and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_filename


def _file(function) -> str:
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return "" if code is None else code.co_filename

"""The attributes of a ParallelModule and of its parts.

A ParallelModule holds parameters and buffers in a skeleton of modules under the user's names; nothing of it
runs but the compiled program. So a plain attribute that is set on it and that the user's model has goes to
the user's model, where the next call looks (`tedfx/runtime/changes.py`). What would have no effect is
refused: other parameters or submodules, hooks on parts, another dtype or device, pickling.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tedfx import _torch
from tedfx.errors import TedfxError

AGAIN = "change the model and parallelize it again"
COPIES = (
    "a ParallelModule belongs to its mesh and cannot be pickled or copied | save pm.state_dict() with "
    "torch.distributed.checkpoint (or tedfx.save_checkpoint), and parallelize the model again to load it"
)


class Mirror(nn.Module):
    """Base of a ParallelModule and of its parts. `_twin()` is the user's module that it stands for, None
    while it is being made or where there is none."""

    def _twin(self) -> nn.Module | None:
        raise NotImplementedError

    def __setattr__(self, name: str, value: Any) -> None:
        twin = self._twin() if "_modules" in self.__dict__ else None
        if twin is None:
            super().__setattr__(name, value)
            return
        if isinstance(value, (nn.Parameter, nn.Module)) or name in self._parameters or name in self._modules:
            raise TedfxError(
                f"{name} = {type(value).__name__}: parameters and submodules of a ParallelModule are "
                f"fixed | {name} | copy values in with load_state_dict, or {AGAIN}"
            )
        if name in self._buffers:
            old = self._buffers[name]
            assert old is not None
            if not isinstance(value, torch.Tensor) or (value.shape, value.dtype, value.device) != (
                old.shape,
                old.dtype,
                old.device,
            ):
                raise TedfxError(
                    f"{name} = {type(value).__name__}: a buffer of a ParallelModule keeps its shape, "
                    f"dtype and device | buffer {name} | assign a tensor like it"
                )
            with torch.no_grad():
                old.copy_(value)
            return
        if (
            name not in self.__dict__
            and not hasattr(type(self), name)
            and (name in vars(twin) or _is_class_data(twin, name) or self._reads(name))
        ):
            setattr(twin, name, value)
            return
        super().__setattr__(name, value)

    def _reads(self, name: str) -> bool:
        """Whether the traced model asks for an attribute of this name that it has not."""
        return False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            twin = self._twin() if not name.startswith("__") and "_modules" in self.__dict__ else None
            if (
                twin is None
                or not (
                    name in vars(twin) and name not in _torch.MODULE_ATTRIBUTES or _is_class_data(twin, name)
                )
                or isinstance(getattr(twin, name), torch.Tensor)
            ):
                raise
            return getattr(twin, name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        self._fixed(f"register_parameter({name!r})")
        super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: torch.Tensor | None, persistent: bool = True) -> None:
        self._fixed(f"register_buffer({name!r})")
        super().register_buffer(name, tensor, persistent)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        self._fixed(f"add_module({name!r})")
        super().add_module(name, module)

    def _fixed(self, what: str) -> None:
        if self._twin() is not None:
            raise TedfxError(
                f"{what}: parameters, buffers and submodules of a ParallelModule are fixed | {what} | {AGAIN}"
            )

    def _apply(self, fn, recurse: bool = True):
        for tensor in (*self.parameters(), *self.buffers()):
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            made = fn(torch.empty(0, dtype=local.dtype, device=local.device))
            if (made.dtype, made.device.type) != (local.dtype, local.device.type):
                to = made.dtype if made.dtype != local.dtype else made.device
                raise TedfxError(
                    f"a ParallelModule stays in its dtype and on its device, it cannot become {to} | "
                    "its programs are compiled for them | convert the model before parallelize, or use "
                    "precision="
                )
        return super()._apply(fn, recurse)

    def __reduce_ex__(self, protocol):
        raise TedfxError(COPIES)

    def __deepcopy__(self, memo):
        raise TedfxError(COPIES)

    __copy__ = lambda self: self.__reduce_ex__(4)


def owner_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds what has this name in `module`, and the last word of the name.

    Not by `get_submodule`, which reads attributes: a user's name may also be one of a ParallelModule's own.
    """
    *path, last = name.split(".")
    for part in path:
        child = module._modules[part]
        assert child is not None
        module = child
    return module, last


def _is_class_data(twin: nn.Module, name: str) -> bool:
    for cls in type(twin).__mro__:
        if cls is nn.Module:
            return False
        if name in vars(cls):
            return not hasattr(vars(cls)[name], "__get__") and not callable(vars(cls)[name])
    return False


class Part(Mirror):
    """A module of the skeleton: `top` is its ParallelModule, `path` its name in the user's model."""

    def __init__(self, top: nn.Module, path: str):
        super().__init__()
        self.__dict__.update(_top=weakref.ref(top), _path=path)

    def _twin(self) -> nn.Module | None:
        top = self.__dict__["_top"]() if "_top" in self.__dict__ else None
        root = top._twin() if top is not None else None
        for part in self.__dict__["_path"].split(".") if root is not None else ():
            root = root._modules.get(part) if root is not None else None
        return root

    def _reads(self, name: str) -> bool:
        top = self.__dict__["_top"]()
        return top is not None and top._asks((self.__dict__["_path"], name))

    def forward(self, *args, **kwargs):
        raise TedfxError(
            f"{self._path} is a part of a ParallelModule, which runs as a whole | {self._path} | call "
            "the ParallelModule, or the part of the plain model"
        )

    def _no_hook(self, *args, **kwargs):
        raise TedfxError(
            f"{self._path} is a part of a ParallelModule and is never called, so its hooks would not be "
            f"| {self._path} | register forward hooks on the model before parallelize, or hooks on the "
            "ParallelModule itself"
        )

    register_forward_hook = register_forward_pre_hook = register_full_backward_hook = (
        register_full_backward_pre_hook
    ) = register_backward_hook = _no_hook


class Guard:
    """Of the parameters and parts of a ParallelModule: looked at before each call."""

    def __init__(self, module: nn.Module, trainable: dict[str, bool]):
        """trainable: {name of a parameter: whether it was to be trained when its layout was made}."""
        self._parameters = []
        for name, trained in trainable.items():
            owner, last = owner_of(module, name)
            self._parameters.append((name, owner._parameters, last, owner._parameters[last], trained))
        self._parts = [(name, part) for name, part in module.named_modules() if part is not module]
        self._module = weakref.ref(module)

    def check(self) -> None:
        """TedfxError for what changed and would not count."""
        for name, table, last, parameter, trained in self._parameters:
            now = table.get(last)
            if now is not parameter:
                raise TedfxError(
                    f"parameter {name} of a ParallelModule was replaced | parameter {name} | copy "
                    f"values in with load_state_dict, or {AGAIN}"
                )
            if now.requires_grad and not trained:
                raise TedfxError(
                    f"parameter {name} was frozen when the model was parallelized, so its gradient "
                    f"would not be summed over the ranks | parameter {name} | leave it trainable for "
                    "parallelize and freeze "
                    "pm's parameter until it trains, or parallelize again"
                )
            for kind in _torch.backward_hooks(now):
                raise TedfxError(
                    f"parameter {name} has a hook ({kind}), which a ParallelModule does not call | "
                    f"parameter {name} | do what it does to p.grad after loss.backward()"
                )
        module = self._module()
        assert module is not None  # it is being called
        for name, part in self._parts:
            if part.training != module.training:
                raise TedfxError(
                    f"{name} is in {'train' if part.training else 'eval'} mode and the ParallelModule "
                    f"is not | {name} | parts are not called: set the mode of the model's own {name} "
                    "before parallelize, and train() or eval() on the "
                    "ParallelModule"
                )


__all__ = ["Guard", "Mirror", "Part", "owner_of"]

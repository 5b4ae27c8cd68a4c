"""A call signature: everything about a call of `forward` that decides which program runs it, sizes apart.

A call is bound to the names of the model's forward and flattened to leaves, each with its path:
`("input_ids",)`, `("images", 0)`. Tensors are data: of them the signature keeps the number of dims, the dtype
and whether they take gradients. Every other leaf is a constant, and its value is part of the signature, as is
the autocast region around the call. `None` is as good as absent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tedfx._torch import pytree
from tedfx.errors import ConfigError
from tedfx.ops.autocast import Autocast

Path = tuple[Any, ...]  # the name of an argument, then keys and positions inside it


@dataclass(frozen=True)
class Signature:
    """`leaves`: (path, "int64[2]" | repr of a constant), by name; hashable, equal on ranks that make the same
    call."""

    leaves: tuple[tuple[Path, str], ...]
    training: bool
    grad: bool
    autocast: Autocast | None = None
    attributes: tuple[
        tuple[str, str], ...
    ] = ()  # of the model, where they are not those of the first trace: `tedfx/runtime/changes.py`

    @classmethod
    def of(
        cls,
        flat: Mapping[Path, Any],
        training: bool,
        grad: bool,
        autocast: Autocast | None = None,
        attributes: tuple[tuple[str, str], ...] = (),
    ) -> "Signature":
        return cls(
            tuple((path, _describe(leaf)) for path, leaf in flat.items()),
            training,
            grad,
            autocast,
            attributes,
        )

    def __str__(self) -> str:
        words = [f"{show(path)}: {text}" for path, text in self.leaves]
        return (
            f"forward({', '.join(words)}) "
            f"{'train' if self.training else 'eval'}{'' if self.grad else ' no_grad'}"
            f"{f' {self.autocast}' if self.autocast else ''}"
            f"{''.join(f' {name}={text}' for name, text in self.attributes)}"
        )


def bind(
    args: Sequence[Any], kwargs: Mapping[str, Any], names: Sequence[str], var_keyword: bool = True
) -> dict[str, Any]:
    """Arguments by the names of forward, without those that are None, sorted by name."""
    if len(args) > len(names):
        raise ConfigError(
            f"forward takes {len(names)} positional arguments ({', '.join(names)}), {len(args)} were given"
        )
    call = dict(zip(names, args))
    for name, value in kwargs.items():
        if name in call:
            raise ConfigError(f"forward got {name!r} twice: by position and by name")
        if name not in names and not var_keyword:
            raise ConfigError(f"forward has no argument {name!r}; it takes {', '.join(names)}")
        call[name] = value
    return {name: call[name] for name in sorted(call) if call[name] is not None}


def flatten(call: Mapping[str, Any]) -> dict[Path, Any]:
    """Leaves of a bound call by path, `None` left out."""
    flat: dict[Path, Any] = {}
    for path, leaf in pytree.tree_flatten_with_path(dict(call))[0]:
        if leaf is not None:
            flat[
                tuple(getattr(key, "key", getattr(key, "idx", getattr(key, "name", None))) for key in path)
            ] = leaf
    return flat


def show(path: Path) -> str:
    return "".join(f"[{key!r}]" if i else str(key) for i, key in enumerate(path))


def _describe(leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        gradient = " grad" if leaf.requires_grad else ""
        return f"{str(leaf.dtype).removeprefix('torch.')}[{leaf.dim()}]{gradient}"
    if not isinstance(leaf, (bool, int, float, complex, str, torch.dtype, torch.device)):
        raise ConfigError(
            f"forward was given a {type(leaf).__name__}; inputs are tensors, numbers, strings and "
            "containers of them"
        )
    return repr(leaf)

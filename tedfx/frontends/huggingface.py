"""Hugging Face transformers: experts through the library's public registry of experts functions.

An experts class decorated with `use_experts_implementation` looks its forward up in a registry, by the name
that its config holds. We register a function that writes the four tedfx operators around the class's own
activation:

    rows, counts, order = dispatch(hidden_states, top_k_index)     rows sorted by expert
    rows = grouped_linear(rows, up or gate_up, counts) (+ bias)    one linear per expert
    rows = _apply_gate(rows) or act_fn(rows)                       the model's own nodes
    rows = grouped_linear(rows, down, counts) (+ bias)
    rows = post_expert_norm(rows)                                  where the class has one
    out  = combine(rows, order, top_k_weights)                     unsort, weigh, sum over the k choices

The router, its scores and their scaling are traced as the model writes them. Experts classes outside the
registry trace as the plain python they are, for the graph frontends to find.

Everything set here (the registry entry, the implementation's name, `use_cache`) is undone on exit.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from tedfx._transformers import RECORDING, install_recording_hooks
from tedfx.errors import CaptureError, ConfigError
from tedfx.ops import experts as ops

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["HuggingFace"]

IMPLEMENTATION = "tedfx"
# These releases change the routing tensors in place inside an experts function, so that what a traced model
# computes differs from what its authors meant.
BROKEN = ((5, 8, 0), (5, 10, 0))
Registry = MutableMapping[str, Any]  # experts functions by name


class Experts(Protocol):
    """What an experts module is asked for: its parameters, its activation, and the layout flags that the
    library's decorator sets. The module has `gate_up_proj` or `up_proj`, and the biases and the norm that it
    says it has."""

    num_experts: int
    is_transposed: bool
    has_gate: bool
    has_bias: bool
    down_proj: Tensor
    down_proj_bias: Tensor

    def _apply_gate(self, gate_up: Tensor) -> Tensor: ...

    def act_fn(self, up: Tensor) -> Tensor: ...

    def post_expert_norm(self, rows: Tensor) -> Tensor: ...


def experts_forward(
    self: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The registered experts function. `self` is the experts module; its layout flags come from its
    decorator."""
    transposed = self.is_transposed
    rows, counts, order = ops.dispatch(hidden_states, top_k_index, self.num_experts)

    up = "gate_up_proj" if self.has_gate else "up_proj"
    rows = ops.grouped_linear(rows, getattr(self, up), counts, transposed)
    if self.has_bias:
        rows = rows + ops.expert_rows(getattr(self, up + "_bias"), counts, rows)

    rows = self._apply_gate(rows) if self.has_gate else self.act_fn(rows)

    rows = ops.grouped_linear(rows, self.down_proj, counts, transposed)
    if self.has_bias:
        rows = rows + ops.expert_rows(self.down_proj_bias, counts, rows)
    if getattr(self, "has_post_expert_norm", False):  # releases before 5.19 have no such classes
        rows = self.post_expert_norm(rows)

    return ops.combine(rows, order, top_k_weights).to(hidden_states.dtype)


class HuggingFace:
    """Frontend for transformers models."""

    name = "huggingface"
    # Python numbers that are data: they change from step to step, so they enter the graph as 0-dim tensors.
    number_inputs = ("num_items_in_batch",)
    # Set by the first call that records a router's scores, for good, with the hooks that record them.
    memories = (RECORDING,)

    def applies(self, model: nn.Module) -> bool:
        # A model of the library cannot exist unless the library is loaded.
        return "transformers" in sys.modules and any(True for _ in _configs(model))

    @contextlib.contextmanager
    def prepare(self, model: nn.Module, notes: list[str]) -> Iterator[None]:
        experts = _experts(model)
        if experts:
            _check_release()
        with _restored(model), _registered(experts), _recording(model):
            for config in _configs(model):
                if vars(config).get("use_cache"):
                    config.use_cache = False
                    notes.append(f"{type(config).__name__}: use_cache was set to False while tracing")
            yield

    @contextlib.contextmanager
    def reference(self, model: nn.Module) -> Iterator[None]:
        with _restored(model):
            for config in _configs(model):
                if vars(config).get("use_cache"):
                    config.use_cache = False
            for module, _ in _experts(model).values():
                _implement(module, "eager")
            yield

    def captured(self, model: nn.Module) -> list[str]:
        return list(_experts(model))


def _configs(model: nn.Module) -> Iterator[PretrainedConfig]:
    """Every distinct config object that the model or a part of it holds, sub-configs included."""
    from transformers import PretrainedConfig

    seen: set[int] = set()
    todo = [vars(module).get("config") for module in model.modules()]
    while todo:
        config = todo.pop()
        if isinstance(config, PretrainedConfig) and id(config) not in seen:
            seen.add(id(config))
            yield config
            todo.extend(vars(config).values())


def _experts(model: nn.Module) -> dict[str, tuple[nn.Module, Registry]]:
    """Experts modules that look their forward up in a registry, by name, each with its registry."""
    found: dict[str, tuple[nn.Module, Registry]] = {}
    for name, module in model.named_modules():
        forward = inspect.unwrap(type(module).forward, stop=_looks_up)
        if _looks_up(forward):
            found[name] = (module, inspect.getclosurevars(forward).nonlocals["experts_interface"])
    return found


def _implement(module: nn.Module, name: str) -> None:
    """Experts look their forward up under this name, which their config holds."""
    setattr(module.config, "_experts_implementation", name)


def _looks_up(function: object) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and "experts_interface" in code.co_freevars


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    saved = [(config, dict(vars(config))) for config in _configs(model)]
    try:
        yield
    finally:
        for config, fields in saved:
            vars(config).clear()
            vars(config).update(fields)


@contextlib.contextmanager
def _recording(model: nn.Module) -> Iterator[None]:
    """With the hooks that record outputs (a router's scores, for one) already installed, as from the second
    call on: the first call is then traced as all others."""
    hooks = [(table := m._forward_hooks, dict(table)) for m in model.modules()]
    flags = HuggingFace.memories
    own = [(vars(m), {k: vars(m)[k] for k in flags if k in vars(m)}) for m in model.modules()]
    try:
        install_recording_hooks(model)
        yield
    finally:
        for table, saved in hooks:
            if len(table) != len(saved):
                table.clear()
                table.update(saved)
        for attributes, saved in own:
            for flag in flags:
                attributes.pop(flag, None)
            attributes.update(saved)


@contextlib.contextmanager
def _registered(experts: dict[str, tuple[nn.Module, Registry]]) -> Iterator[None]:
    for name, (module, _) in experts.items():
        if vars(module).get("_is_expert_parallel"):
            raise ConfigError(
                f"{name} is already expert-parallel: pass the model as one device holds it (load it "
                "without a tp_plan "
                "or distributed_config)"
            )
        missing = [a for a in ("num_experts", "down_proj") if not hasattr(module, a)]
        if missing:
            raise CaptureError(
                f"{name} ({type(module).__name__}) has no {' and no '.join(missing)}: cannot capture it"
            )
    registries = {id(registry): registry for _, registry in experts.values()}.values()
    for registry in registries:
        registry[IMPLEMENTATION] = experts_forward
    try:
        for module, _ in experts.values():
            _implement(module, IMPLEMENTATION)
        yield
    finally:
        for registry in registries:
            del registry[IMPLEMENTATION]


def _check_release() -> None:
    import transformers

    release = tuple(int(n) for n in re.findall(r"\d+", transformers.__version__)[:3])
    if BROKEN[0] <= release <= BROKEN[1]:
        raise ConfigError(
            f"transformers {transformers.__version__} changes routing tensors in place (5.8.0 to 5.10.0 do): "
            "install a later release"
        )

"""A model's own initialisation, run on a model without storage (`tedfx/state/one_at_a_time.py`)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tedfx import _transformers
from tedfx.errors import ConfigError
from tedfx.state.one_at_a_time import OnCpu, OneAtATime, Slot


def initialise(
    model: nn.Module, slots: list[Slot], seed: int, init: Callable[[nn.Module], None] | None = None
) -> int:
    """Run `init` (applied as `model.apply` does), or the model's own initialisation; a checksum of the
    values.

    `slots`: one per tensor of the model on the meta device, tied ones once. The model is left as it was;
    values go to `Slot.keep`. What is not given a value in full is left with `kept and whole` false.
    """
    with _as_it_was(model), torch.random.fork_rng(devices=[]), torch.no_grad():
        by_id = {id(slot.meta): slot for slot in slots}
        thrown = [Slot(f"tied {name}", meta) for name, meta in _untied(model)] if init is None else []
        torch.default_generator.manual_seed(seed)
        mode = OneAtATime([*slots, *thrown])
        places = [(table, key, value) for table, key, value in _tensors(model) if id(value) in by_id]
        with mode, OnCpu():
            if init is None:
                own_initialisation(model)
            else:
                model.apply(init)
        mode.finish()
        for table, key, value in places:
            slot, now = by_id[id(value)], table.get(key)
            if now is value:
                continue
            if (
                not isinstance(now, Tensor)
                or now.is_meta
                or now.shape != value.shape
                or now.dtype != value.dtype
            ):
                raise ConfigError(
                    f"{slot.name} was replaced by something else while it was initialised; write to it "
                    "in place"
                )
            slot.whole = True
            mode.receive(slot, now.detach())
    return mode.checksum


def own_initialisation(model: nn.Module) -> None:
    """A Hugging Face model's own `initialize_weights`; of other modules `reset_parameters`, in the order of
    `model.modules()`."""
    seen: set[int] = set()

    def visit(module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        if _transformers.is_pretrained(module):
            module.initialize_weights()
            seen.update(id(m) for m in module.modules())
            return
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
        for child in module.children():
            visit(child)

    visit(model)


def _untied(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A Hugging Face model initialises its tied weights each by itself and ties them last: the sources'
    values count.

    Puts tensors of their own in the place of those that are tied to others (until the model is put back as it
    was).
    """
    for prefix, module in list(model.named_modules()):
        if not _transformers.is_pretrained(module):
            continue
        for target, source in _transformers.tied(module).items():
            owner, _, last = target.rpartition(".")
            table = module.get_submodule(owner)._parameters
            tied = table.get(last)
            if tied is not None and tied is module.get_parameter(source):
                own = table[last] = nn.Parameter(torch.empty_like(tied, device="meta"), tied.requires_grad)
                yield f"{prefix}.{target}".lstrip("."), own


def _tensors(model: nn.Module) -> list[tuple[dict, str, Tensor]]:
    return [
        (table, key, value)
        for m in model.modules()
        for table in (m._parameters, m._buffers)
        for key, value in table.items()
        if value is not None
    ]


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    tables: list[dict[str, Any]] = [
        table for m in model.modules() for table in (vars(m), m._parameters, m._buffers)
    ]
    saved = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, values in zip(tables, saved):
            table.clear()
            table.update(values)

"""Two training steps of a model and of its captured graph, side by side on one device: outputs, gradients and
buffers of both steps.

What is compared is what a run would do with either: forward and backward on one random input, plain SGD with
the same small rate, and once more. A backward that is not that of the traced operators (hooks, an
autograd.Function, a gradient that a checkpoint lost) differs in the first step; state that is no buffer, or a
buffer that is not written back, in the second.

The graph has leaves of its own, with the values of the model's parameters and without their hooks. The
objective is `loss` where the output has a scalar of that name, or the output where it is a scalar; else the
sum of all differentiable outputs times fixed cotangents, so that the gradient of each is seen. In eval mode,
and where nothing requires a gradient, two forwards are compared.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tedfx._torch import pytree
from tedfx.checking.compare import Found, Step, Tolerance, compare
from tedfx.checking.float64 import reading, wide
from tedfx.checking.inputs import FEWEST, SIZES, random_inputs
from tedfx.ops.autocast import region
from tedfx.trace.global_graph import Trace
from tedfx.trace.restored import on_gpu, untouched

__all__ = ["GraphFailed", "two_steps"]

STEPS = 2
RELATIVE_UPDATE = 1e-2  # norm of the update over that of the parameters: seen in the second step, and small


def two_steps(
    model: nn.Module,
    captured: Trace,
    frontends: Sequence[Any],
    bounds: tuple[int, int],
    tolerance: Tolerance,
    *,
    as_dtype: torch.dtype | None = None,
    own: bool = False,
    sampled: frozenset[str] | None = None,
    alike: bool = False,
) -> Found:
    """Run both and compare. The model is left as it was.

    own      in the dtypes of the model, else in float64 (`tedfx.checking.float64`), where `torch.finfo`
             answers for `as_dtype`.
    sampled  names of the parameters whose gradients are compared and which are updated; the others are
             constants. None: all.
    alike    on tokens that are all the same.

    Raises what the model raises on this input, `Draws` and `NoFloat64`; GraphFailed where the graph fails and
    the model does not.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    constant = (
        set()
        if sampled is None
        else {id(p) for name, p in named.items()} - {id(named[name]) for name in sampled}
    )
    names: dict[int, str] = {}
    for name, p in named.items():
        if p.requires_grad and id(p) not in constant and captured.training:
            names.setdefault(id(p), name)
    order = _order_of_use(captured)
    names = dict(sorted(names.items(), key=lambda item: order.get(item[1], 0)))
    asked = _asked(captured)
    call = random_inputs(captured, bounds, SIZES if sampled is None else FEWEST, alike=alike)
    cast = wide if not own else lambda dtype: dtype
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(bool(names)))
        stack.enter_context(torch.random.fork_rng(on_gpu(captured.device)))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(untouched(model, cast, constant))
        if model.training != captured.training:
            model.train(captured.training)
        for frontend in frontends:
            stack.enter_context(frontend.reference(model))
        copies: dict[int, torch.Tensor] = {}  # a tied tensor is one
        tensors = {
            name: copies.setdefault(id(t), t.detach() if id(t) in constant else t.detach().clone())
            for name, t in _tensors(model)
        }
        program = lambda as_dtype: contextlib.nullcontext() if own else reading(as_dtype)
        buffers = [name for name, _ in model.named_buffers(remove_duplicate=False)]
        with program(as_dtype), region(captured.autocast, captured.device.type):
            leaves = {name: named[name] for name in names.values()}
            run = lambda: pytree.tree_leaves(model(**_given(call, cast)), is_leaf=lambda x: x is None)
            expected, rate = _train(
                run,
                leaves,
                lambda: _buffers(dict(model.named_buffers(remove_duplicate=False)), buffers),
                asked,
            )
        with program(None), region(None, captured.device.type):
            leaves = {name: tensors[name].requires_grad_() for name in names.values()}
            try:
                actual, _ = _train(
                    lambda: _graph(captured, tensors, _given(call, cast)),
                    leaves,
                    lambda: _buffers(tensors, buffers),
                    asked,
                    rate,
                )
            except Exception as error:
                raise GraphFailed(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
        return compare(expected, actual, _output_names(captured), tolerance, own)


class GraphFailed(Exception):
    """The captured graph raised on an input that the model takes."""


def _tensors(model: nn.Module):
    return itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )


def _order_of_use(captured: Trace) -> dict[str, int]:
    """Parameter -> place in the graph of the first operator that reads it."""
    place = {node: i for i, node in enumerate(captured.graph_module.graph.nodes)}
    used = {
        n.name: min((place[user] for user in n.users), default=0)
        for n in captured.graph_module.graph.find_nodes(op="placeholder")
    }
    found = {name: used[p] for p, name in captured.parameters.items() if p in used}
    return found | {name: used[p] for p, names in captured.stacked.items() if p in used for name in names}


def _given(call: Mapping[str, Any], cast: Callable) -> dict[str, Any]:
    """The inputs as new tensors: a model may write to them."""
    return pytree.tree_map(
        lambda x: (
            x.detach().to(cast(x.dtype), copy=True).requires_grad_(x.requires_grad)
            if isinstance(x, torch.Tensor)
            else x
        ),
        dict(call),
    )


def _buffers(now: Mapping[str, torch.Tensor], names: Container[str]) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in now.items() if name in names}


def _graph(captured: Trace, tensors: dict[str, torch.Tensor], call: Mapping[str, Any]) -> list[Any]:
    """The model's outputs by the graph; buffers that it changes are written to `tensors`."""
    results = list(captured.graph_module(*captured.state_of(tensors), *captured.flatten((), dict(call))))
    changed = len(captured.mutated_buffers)
    for name, value in zip(captured.mutated_buffers, results):
        tensors[name] = value.detach()
    for name, first in captured.tied.items():
        if first in captured.mutated_buffers:
            tensors[name] = tensors[first]
    return results[changed:]


def _output_names(captured: Trace) -> list[str]:
    spec = captured.out_spec
    names = [""] * spec.num_leaves
    for path, index in pytree.tree_flatten_with_path(
        pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    )[0]:
        keys = [getattr(k, "key", getattr(k, "idx", getattr(k, "name", None))) for k in path]
        names[index] = "".join(f"[{k!r}]" if i else str(k) for i, k in enumerate(keys)) or "output"
    return names


@dataclass(frozen=True)
class _Asked:
    """Which flattened outputs count, and which of them is the objective (None: all)."""

    outputs: frozenset[int]
    objective: int | None


def _asked(captured: Trace) -> _Asked:
    """By the graph: outputs that were not asked for are None there."""
    (output,) = captured.graph_module.graph.find_nodes(op="output")
    values = list(output.args[0])[len(captured.mutated_buffers) :]
    scalar = lambda i: getattr(getattr(values[i], "meta", {}).get("val"), "ndim", None) == 0
    asked = frozenset(i for i, value in enumerate(values) if value is not None)
    names = _output_names(captured)
    loss = next((i for i in asked if (names[i] == "loss" or len(values) == 1) and scalar(i)), None)
    return _Asked(asked, loss)


# ---- running -----------------------------------------------------------------------------------------------
# ----------------


def _train(
    run: Callable[[], list],
    leaves: Mapping[str, torch.Tensor],
    buffers: Callable[[], dict],
    asked: _Asked,
    rate: float | None = None,
) -> tuple[list[Step], float | None]:
    steps = []
    for _ in range(STEPS):
        outputs = run()
        total = _objective(outputs, asked) if leaves else None
        gradients = _gradients(total, leaves) if leaves else {}
        kept = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in outputs]
        for i in range(len(kept)):
            if i not in asked.outputs:
                kept[i] = None
        steps.append(
            Step(
                kept,
                {n: None if g is None else g.detach() for n, g in gradients.items()},
                buffers(),
                total is None or bool(total.isfinite()),
            )
        )
        del outputs, total
        moved = {name: g for name, g in gradients.items() if g is not None}
        if moved:
            norm = lambda tensors: float(torch.stack([t.detach().double().norm() for t in tensors]).norm())
            rate = (
                RELATIVE_UPDATE * norm([leaves[n] for n in moved]) / max(norm(moved.values()), 1e-300)
                if rate is None
                else rate
            )
            for name, g in moved.items():
                leaves[name].data.sub_(g, alpha=rate)
    return steps, rate


def _objective(outputs: list[Any], asked: _Asked) -> torch.Tensor | None:
    """None where no gradient reaches the outputs."""
    total = None
    for i, x in enumerate(outputs):
        if (
            not isinstance(x, torch.Tensor)
            or not x.requires_grad
            or i not in asked.outputs
            or asked.objective not in (None, i)
        ):
            continue
        if asked.objective == i:
            return x
        x = torch.view_as_real(x) if x.is_complex() else x
        cotangent = (
            torch.arange(x.numel(), device=x.device, dtype=torch.float64)
            .mul_(2.399963)
            .add_(i)
            .cos_()
            .view(x.shape)
            .to(x.dtype)
        )
        term = (torch.where(x.isfinite(), x, 0) * cotangent).sum()
        total = term if total is None else total + term
    return total


def _gradients(
    total: torch.Tensor | None, leaves: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor | None]:
    if total is None:
        return dict.fromkeys(leaves)
    try:
        return dict(
            zip(
                leaves,
                torch.autograd.grad(total, list(leaves.values()), allow_unused=True, retain_graph=True),
            )
        )
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
    # Reentrant checkpointing runs a backward of its own inside, which leaves gradients in `.grad` alone;
    # `untouched` puts those back.
    for leaf in leaves.values():
        leaf.grad = None
    total.backward()
    return {name: leaf.grad for name, leaf in leaves.items()}

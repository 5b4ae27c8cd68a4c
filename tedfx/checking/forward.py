"""Does the captured graph compute what the model does? One forward of both on one device, before anything is
sharded; which captured module differs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from tedfx._torch import pytree
from tedfx.checking.inputs import attempts, random_inputs
from tedfx.dtypes import precision, widest
from tedfx.errors import CaptureError
from tedfx.ops.autocast import region
from tedfx.trace.global_graph import Trace
from tedfx.trace.observed import kept
from tedfx.trace.restored import on_gpu

__all__ = ["check_capture", "on_device"]

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
_HALF = (torch.bfloat16, torch.float16)


def check_capture(
    model: nn.Module,
    captured: Trace,
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
    *,
    frontends: Sequence[Any] | None = None,
    bounds: tuple[int, int] | None = None,
) -> float:
    """Run the captured graph against the model in its authors' form, same dtype; the largest relative
    difference of an output.

    Without inputs, random ones are made (`tedfx.checking.inputs`, with `bounds` for the integers). A
    difference beyond rounding raises `CaptureError` with the first captured module that differs. In 16 bits a
    near-tie may route a token elsewhere: there each captured module is judged on its own, with the inputs
    that it had in the model.
    """
    if frontends is None:
        from tedfx.frontends import default_frontends

        frontends = default_frontends()
    frontends = [f for f in frontends if f.applies(model)]
    if not args and not kwargs:
        kwargs = random_inputs(captured, bounds or next(attempts(model)))
    seen: dict[str, tuple] = {}
    with torch.no_grad(), torch.random.fork_rng(on_gpu(captured.device)), _buffers_kept(model) as put_back:
        # Inside: what is kept is put back as it was found, and hooks are part of it.
        hooks = [
            model.get_submodule(name).register_forward_hook(
                lambda m, a, k, out, name=name: seen.__setitem__(name, (a, k, out)), with_kwargs=True
            )
            for name in captured.captured
        ]
        try:
            with contextlib.ExitStack() as stack:
                for frontend in frontends:
                    stack.enter_context(frontend.reference(model))
                with region(captured.autocast, captured.device.type):
                    expected = [
                        x.clone() if isinstance(x, torch.Tensor) else x
                        for x in pytree.tree_leaves(model(*args, **(kwargs or {})))
                    ]  # not the buffers themselves
        finally:
            for hook in hooks:
                hook.remove()
        put_back()
        with region(None, captured.device.type):
            given = captured.flatten(args, kwargs)
            try:
                outputs = captured.graph_module(*captured.state(model), *given)
            except Exception as error:
                cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                raise CaptureError(
                    f"the captured graph fails on an input that the model takes: {cause}"
                ) from error
        actual = list(outputs)[len(captured.mutated_buffers) :]
        pairs = [
            (a, e) for a, e in zip(actual, expected) if a is not None
        ]  # None: an output that was not asked for
        coarse = _coarsest(captured)
        worst = max((_difference(a, e) / max(_tolerance(e), coarse) for a, e in pairs), default=0.0)
        if not worst <= 1.0 or len(actual) != len(expected):
            put_back()
            half = coarse > 0 or any(
                isinstance(e, torch.Tensor) and e.dtype in _HALF for e in (*expected, *model.parameters())
            )
            with region(captured.autocast, captured.device.type):
                alone = _module_alone(model, frontends, seen) if half and seen else None
            name, error = (
                alone if alone is not None else _first_difference(model, captured, seen, args, kwargs or {})
            )
            if name:
                raise CaptureError(
                    f"the captured graph does not compute what the model does: {name} differs by "
                    f"{error:.1e} relative "
                    f"to its size ({worst:.1e} of the tolerance at the outputs)"
                )
    return max((_difference(a, e) for a, e in pairs), default=0.0)


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[Any]:
    saved = {name: b.clone() for name, b in model.named_buffers()}

    def put_back() -> None:
        for name, b in model.named_buffers():
            b.copy_(saved[name])

    try:
        with kept(model):  # also the buffers themselves, where forward assigns others
            yield put_back
    finally:
        put_back()


def _difference(actual: Any, expected: Any) -> float:
    if not isinstance(expected, torch.Tensor):
        return 0.0 if actual == expected else float("inf")
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    a, e = widest(actual), widest(expected)
    if torch.equal(a, e):
        return 0.0
    return float((a - e).norm() / e.norm().clamp_min(torch.finfo(torch.float64).tiny))


def _coarsest(captured: Trace) -> float:
    """The tolerance of the coarsest dtype that autocast brings something to, 0 without: outputs in float32
    then hold no more digits."""
    return max((_TOLERANCE[dtype] for dtype in captured.lowered), default=0.0)


def _tolerance(expected: Any) -> float:
    return _TOLERANCE.get(precision(expected.dtype), 1e-10) if isinstance(expected, torch.Tensor) else 1.0


def on_device(captured: Trace, device: torch.device) -> Trace:
    """The trace for another device than the one it was made for: the model's weights may wait on the host for
    a mesh of GPUs."""
    if captured.device == device:
        return captured
    graph = fx.Graph()
    graph.output(graph.graph_copy(captured.graph_module.graph, {}))
    move = lambda tree: pytree.tree_map(lambda x: device if isinstance(x, torch.device) else x, tree)
    for node in graph.nodes:
        if node.op == "call_function":
            node.args, node.kwargs = move(node.args), move(node.kwargs)
    constants = {name: value.to(device) for name, value in captured.constants.items()}
    return dataclasses.replace(
        captured,
        graph_module=fx.GraphModule(captured.graph_module, graph),
        constants=constants,
        device=device,
    )


def _module_alone(model: nn.Module, frontends: Sequence[Any], seen: dict[str, tuple]) -> tuple[str, float]:
    """The first captured module that does not give in its captured form what it gave in the model, for the
    same inputs."""
    with contextlib.ExitStack() as stack:
        for frontend in frontends:
            if frontend.captured(model):
                stack.enter_context(frontend.prepare(model, []))
        for name, (args, kwargs, out) in seen.items():
            error = _difference(model.get_submodule(name)(*args, **kwargs), out)
            if error > _tolerance(out):
                return name, error
    return "", 0.0


def _first_difference(model, captured: Trace, seen: dict[str, tuple], args, kwargs) -> tuple[str, float]:
    """The first captured module whose output in the graph is not what the model's own was."""
    last: dict[fx.Node, str] = {}
    for name in captured.captured:
        nodes = [n for n in captured.graph_module.graph.nodes if name in _module_names(n) and "val" in n.meta]
        if nodes:
            last[nodes[-1]] = name
    found: list[tuple[str, float]] = []

    class Watch(fx.Interpreter):
        def run_node(self, node):
            value = super().run_node(node)
            name = last.get(node)
            own = seen.get(name, (None,))[-1] if name is not None else None
            if isinstance(own, torch.Tensor):
                error = _difference(value.reshape(own.shape) if value.numel() == own.numel() else value, own)
                if error > _tolerance(value):
                    found.append((last[node], error))
            return value

    Watch(captured.graph_module).run(*captured.state(model), *captured.flatten(args, kwargs))
    return found[0] if found else ("a part outside the captured modules", float("nan"))


def _module_names(node: fx.Node) -> list[str]:
    return [entry[0] for entry in (node.meta.get("nn_module_stack") or {}).values()]

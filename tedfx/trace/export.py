"""From a module to one global graph.

`trace` exports the unmodified model (`torch.export`, non-strict, composite operators kept whole) with two
size symbols, batch and sequence, and returns a plain `fx.GraphModule` whose placeholders are parameters,
buffers, constants and tensor inputs, in that order. No mesh is in sight, and nothing is allocated: while the
model is traced its parameters are fake, on the device that will run it.

Steps:
1. Bind the example inputs to the names of `forward`, give every tensor its own object and the two sizes their
   Dims.
2. Swap parameters and buffers for fakes, let the frontends prepare the model, export, and put everything
   back.
3. A size that the model fixes or bounds is exported again so, and written down in `Trace.static`.
4. Flatten: inline no-grad and autocast regions, drop assertions and dead code, keep one placeholder per tied
   weight, write out what autocast casts.

Terms: a *path* is where an input sits in the call, ("input_ids",) or ("images", 0); FQN is a name in
`model.state_dict()`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes
from torch.nn.attention import SDPBackend, sdpa_kernel

from tedfx._torch import FakeTensorMode, export_hooks, frames_of_nodes, pytree, quiet_export, sizes_asked
from tedfx.errors import TraceError, line_below, model_frames, user_line
from tedfx.frontends import default_frontends
from tedfx.ops.autocast import Autocast, region
from tedfx.trace.calls import Subject, bind, infer_inputs, leaves_with_path, shown
from tedfx.trace.flat import flat
from tedfx.trace.functions import kept_calls
from tedfx.trace.global_graph import Trace
from tedfx.trace.hooks import refuse_hooks
from tedfx.trace.input_sizes import as_given, plan_sizes, settle
from tedfx.trace.maps import recorded_maps
from tedfx.trace.observed import Observation
from tedfx.trace.own_error import own_error
from tedfx.trace.regions import NoGradInsideAutocast
from tedfx.trace.side_gradients import refuse_side_gradients
from tedfx.trace.stand_ins import fake_state, idle_conversions, named_forward

__all__ = ["trace"]

ATTEMPTS = 7  # of an export: each fixes or bounds sizes that the one before was refused for


def trace(
    model: nn.Module,
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
    *,
    device: torch.device | str | None = None,
    frontends: Sequence[Any] | None = None,
    reading: frozenset[int] | None = None,
) -> Trace:
    """Trace `model` as it stands (its training flag, its dtypes, the autocast region around this call) into
    one graph. See the module's docstring.

    Only shapes and dtypes of the example inputs matter; without any, `infer_inputs` makes them. `device` is
    where the graph will run, by default the device of the parameters; a model on the meta device needs none
    to exist. `reading`: which dims are the batch, see `tedfx/trace/input_sizes.py`; found where it is not
    given. TraceError where the model cannot be traced, with its line.
    """
    frontends = default_frontends() if frontends is None else frontends
    if not args and not kwargs:
        kwargs = infer_inputs(model)
    refuse_hooks(model)
    device = _device(model, device)
    around = Autocast.around(device.type)
    signature = inspect.signature(model.forward)
    call = bind(signature, tuple(args), dict(kwargs or {}))
    if reading is None:
        again = functools.partial(trace, model, args, kwargs, device=device, frontends=frontends)
        return settle(
            call, [shown(path) for path, _ in leaves_with_path(call)], lambda reading: again(reading=reading)
        )
    taken = {size for t in model.parameters() for size in t.shape}
    sizes, roles, static = plan_sizes(call, taken, reading)
    subject = Subject(model, signature, call, roles, device, around, static=list(static))
    used = [f for f in frontends if f.applies(model)]
    observation = Observation(model)
    observation.remember([name for f in used for name in f.memories])
    failure: Exception | None = None
    with _prepared(subject, used) as mode, observation.watching():
        export = _Export(subject, sizes, mode)
        for attempt in range(ATTEMPTS):
            try:
                exported = export()
                observation.settle(str(exported.graph), lambda: str(export().graph))
                break
            except TraceError:  # a frontend's own, with the line
                raise
            except Exception as error:
                if not export.learn(error) or attempt == ATTEMPTS - 1:
                    failure = error
                    break
    if failure is not None:
        own = own_error(
            model, call, used, around, lambda fakes: fake_state(model, fakes, torch.device("cpu"))
        )
        raise (own or _trace_error(failure)) from failure
    made = flat(exported, subject, export.free, export.asked)
    return dataclasses.replace(made, observed=observation.observed())


def _device(model: nn.Module, given: torch.device | str | None) -> torch.device:
    """Where the graph will run."""
    if given is None:
        state = [*model.parameters(), *model.buffers()]
        given = next((t.device for t in state if t.device.type != "meta"), torch.get_default_device())
    device = torch.device(given)
    if device.type not in ("cpu", "meta") and not torch.get_device_module(device).is_available():
        raise TraceError(f"device {device} is not available here: pass device='cpu' to trace without it")
    return device


@contextlib.contextmanager
def _prepared(subject: Subject, frontends: Sequence[Any]) -> Iterator[FakeTensorMode]:
    """The model and torch as an export needs them, and put back."""
    model, mode = subject.model, FakeTensorMode(allow_non_fake_inputs=True)
    line = functools.partial(line_below, __file__)
    with contextlib.ExitStack() as stack:
        for frontend in frontends:
            stack.enter_context(frontend.prepare(model, subject.notes))
        subject.captured += [name for f in frontends for name in f.captured(model)]
        stack.enter_context(fake_state(model, mode, subject.device))
        stack.enter_context(named_forward(model, list(subject.call)))
        stack.enter_context(region(subject.around, subject.device.type))
        stack.enter_context(NoGradInsideAutocast(__file__))
        stack.enter_context(refuse_side_gradients(line))
        stack.enter_context(idle_conversions(line))
        stack.enter_context(kept_calls(subject.device.type, line))
        stack.enter_context(recorded_maps())
        # Attention stays one node whatever kernel runs it later; the fused kernels' shape functions on CUDA
        # would fix the length to their alignment.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        # Where opt_einsum is installed, torch asks it for the order of a product of three operands; it takes
        # sizes as numbers, which would fix them.
        stack.enter_context(torch.backends.opt_einsum.flags(enabled=False))
        stack.enter_context(frames_of_nodes(lambda frames: model_frames(frames, __file__)))
        yield mode


class _Export:
    """Exports a call with its sizes free, as far as the model lets them be.

    free      name -> the Dim of each size that is free; of one that the model fixes nothing is left
    asked     (expression, answer): what the model's Python asked of sizes in the last export
    """

    def __init__(self, subject: Subject, sizes: dict[str, tuple[int, int]], mode: FakeTensorMode):
        """sizes: name -> (the size as given, the size to trace with)."""
        self.subject, self.sizes, self.mode = subject, sizes, mode
        self.free: dict[str, Any] = {name: torch.export.Dim(name) for name in sizes}
        self.asked: list[tuple[Any, Any]] = []
        self._traced = {name: size for name, (_, size) in sizes.items()}
        self._deferred = False
        self._leaves, self._spec = pytree.tree_flatten(subject.call)

    def __call__(self) -> torch.export.ExportedProgram:
        with quiet_export(), export_hooks(), sizes_asked() as self.asked:
            return torch.export.export(
                self.subject.model,
                (),
                self._of_leaves(self._example),
                dynamic_shapes=self._of_leaves(self._free_dims),
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=self._deferred,
            )

    def learn(self, error: Exception) -> bool:
        """What a refusal says of sizes, for the next attempt. Whether there is anything to try."""
        fixes = _suggested(str(error), self.free)
        if (
            not self._deferred
            and "Constraints violated" in str(error)
            and "Suggested fixes:" not in str(error)
        ):
            # a condition that export cannot solve for a size: let it stand in the graph, as `flat` reads it
            self._deferred = True
            return True
        if not fixes:
            given = as_given(self.sizes)
            if self._traced == given:
                return False
            self._traced = given  # our sizes do not suit the model: the given ones
        for name, fix in fixes.items():
            if isinstance(fix, int):
                self.subject.static.append(f"{name} = {self.sizes[name][0]}: the model fixes this size")
                del self.free[name]
            else:
                self.subject.static.append(f"{name}: the model only accepts {fix}")
                self.free[name] = fix
        return True

    def _of_leaves(self, make: Any) -> Any:
        made = [make(leaf, dims) for leaf, dims in zip(self._leaves, self.subject.roles)]
        return self._spec.unflatten(made)

    def _example(self, leaf: Any, dims: dict[int, str] | None) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        sizes = {n: self._traced[n] if n in self.free else given for n, (given, _) in self.sizes.items()}
        shape = [sizes.get((dims or {}).get(d, ""), size) for d, size in enumerate(leaf.shape)]
        with self.mode:  # a new object each: export merges inputs that are one object
            made = torch.empty(shape, dtype=leaf.dtype, device=self.subject.device)
            return made.requires_grad_(leaf.requires_grad)

    def _free_dims(self, leaf: Any, dims: dict[int, str] | None) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return None
        return {d: self.free[n] for d, n in (dims or {}).items() if n in self.free} or None


def _suggested(message: str, free: dict[str, Any]) -> dict[str, Any]:
    """What to do about a violated constraint on our Dims: an int (fixed) or another Dim (bounded,
    divisible)."""
    lines = []
    for line in message.partition("Suggested fixes:")[2].strip("\n").splitlines():
        if not re.match(r"\s+\w+ = ", line):
            break
        lines.append(line)
    if lines:
        shapes = {name: {0: dim} for name, dim in free.items()}
        refined = refine_dynamic_shapes_from_suggested_fixes("Suggested fixes:\n" + "\n".join(lines), shapes)
        assert isinstance(refined, dict), refined  # as the shapes were given
        return {n: refined[n][0] for n in free if repr(refined[n][0]) != repr(free[n])}
    # A test on a small size (`s - 1 != 1`) comes without a suggestion: ask for more than such tests look at,
    # then fix the size.
    violated = re.search(r"Constraints violated \(([^)]*)\)", message)
    names = [n for n in (violated.group(1).split(", ") if violated else []) if n in free]
    return {n: torch.export.Dim(n, min=4) if getattr(free[n], "min", 0) in (0, None) else 0 for n in names}


def _trace_error(error: Exception) -> TraceError:
    text = str(error).strip()
    cause = text.splitlines()[0] if text else type(error).__name__
    where = user_line(error)
    if "data-dependent" in text or type(error).__name__ == "GuardOnDataDependentSymNode":
        return TraceError(
            "cannot trace: the model's Python asks for a value that is only known when it runs | at "
            f"{where} | make the computation independent of tensor "
            "values there (torch.where in place of an if), or of the number of matching elements "
            f"({type(error).__name__}: {cause})"
        )
    returned = re.search(r"Found <class '([\w.]+)'> in output, which is not a known type", text)
    if returned:
        return TraceError(
            f"the model returns a {returned[1]}, of which torch.export knows no tensors | at {where} | "
            "return tensors and containers of them (a transformers model that computes without its cache: "
            "use_cache=False)"
        )
    if "Constraints violated" in text:
        fix = "pass example inputs with sizes that this line accepts"
    else:
        fix = "make this line traceable by torch.export, or take it out of forward"
    return TraceError(f"cannot trace: {type(error).__name__}: {cause} | at {where} | {fix}")

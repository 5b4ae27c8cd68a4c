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
import itertools
import re
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes
from torch.export.graph_signature import InputKind, OutputKind
from torch.nn.attention import SDPBackend, sdpa_kernel

from tedfx._torch import FakeTensorMode, export_hooks, frames_of_nodes, pytree, quiet_export
from tedfx.errors import TraceError, line_below, model_frames, user_line
from tedfx.graph.emit import emit, evaluate
from tedfx.ops.autocast import Autocast, region
from tedfx.placement.derived import symbol_of
from tedfx.trace.call_check import SizeCheck
from tedfx.trace.casts import explicit_casts
from tedfx.trace.functions import keep_calls, kept_calls
from tedfx.trace.hooks import refuse_hooks
from tedfx.trace.input_sizes import as_given, plan_sizes, settle
from tedfx.trace.observed import Observation
from tedfx.trace.own_error import own_error
from tedfx.trace.regions import NoGradInsideAutocast, inline_regions
from tedfx.trace.side_gradients import refuse_side_gradients

__all__ = ["Trace", "infer_inputs", "trace"]

aten = torch.ops.aten

# Operators that only assert: they shape no value.
_ASSERTIONS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.default,
    aten._assert_async.msg,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}


@dataclasses.dataclass
class Trace:
    """The global graph of a model, and how its placeholders and outputs relate to the model and to a call.

    graph_module      placeholders: parameters, buffers, constants, tensor inputs; outputs: new values of
                      `mutated_buffers`, then the flattened outputs of the model.
    parameters        placeholder -> FQN; a tied weight is one placeholder.
    tied              FQN -> the FQN that stands for it.
    stacked           placeholder -> FQNs of the parameters that it stacks along a new dim 0 (filled by
                      `capture_loops`).
    buffers           placeholder -> FQN.
    constants         placeholder -> tensor that the model's code made while it was traced.
    inputs            placeholder -> path in the call, in the order of the placeholders.
    in_spec, out_spec pytree specs of ((args), {kwargs}) and of the model's outputs.
    mutated_buffers   FQNs of buffers that the model changes (filled by the `functionalize` pass).
    sizes             "batch" and "sequence" -> size symbol, those that the model leaves free.
    extents           "batch" and "sequence" -> the size itself: its symbol, or 2*s where the model only
                      accepts even ones (`tedfx/placement/derived.py`).
    conditions        what the sizes of a call must satisfy besides, as expressions in the size symbols.
    static            one line for every size that the model fixes or bounds.
    values            path -> value of inputs that are not tensors; a call must pass the same.
    autocast          the autocast region around the call that was traced; its casts are in the graph, as are
                      those of regions inside the model.
    lowered           the dtypes of the autocast regions that changed something.
    observed          what of the model's Python the graph depends on, and the values that were traced: see
                      `tedfx/trace/reads.py`.
    checked           model -> what the capture check found of this trace after which passes, so that it is
                      made once (`tedfx.checking.forward`).
    """

    graph_module: fx.GraphModule
    parameters: dict[str, str]
    tied: dict[str, str]
    buffers: dict[str, str]
    constants: dict[str, torch.Tensor]
    inputs: dict[str, tuple]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    training: bool
    signature: inspect.Signature
    sizes: dict[str, sympy.Symbol]
    bounds: dict[sympy.Symbol, tuple[int, int | None]]
    static: list[str]
    notes: list[str]
    values: dict[tuple, Any]
    device: torch.device
    mutated_buffers: list[str] = dataclasses.field(default_factory=list)
    captured: list[str] = dataclasses.field(default_factory=list)
    conditions: list[sympy.Basic] = dataclasses.field(default_factory=list)
    stacked: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    autocast: Autocast | None = None
    lowered: frozenset[torch.dtype] = frozenset()
    extents: dict[str, sympy.Expr] = dataclasses.field(default_factory=dict)
    observed: dict[tuple, Any] = dataclasses.field(default_factory=dict)
    checked: weakref.WeakKeyDictionary = dataclasses.field(
        default_factory=weakref.WeakKeyDictionary, repr=False, compare=False
    )
    limits: dict[tuple, int] = dataclasses.field(default_factory=dict)

    @property
    def frozen(self) -> set[str]:
        """Names of the parameters that took no gradient when this was traced, single ones."""
        nodes = {n.name: n for n in self.graph_module.graph.find_nodes(op="placeholder")}
        return {
            name
            for p, name in self.parameters.items()
            if p in nodes and not nodes[p].meta["val"].requires_grad
        }

    def flatten(self, args: tuple = (), kwargs: dict[str, Any] | None = None) -> list[torch.Tensor]:
        """The tensors of a call, in the order of the input placeholders; a call unlike the traced one is
        refused."""
        given = dict(leaves_with_path(_bind(self.signature, args, kwargs or {})))
        given = {path: value for path, value in given.items() if value is not None}
        for path, value in self.values.items():
            if value is not None and (path not in given or given.pop(path) != value):
                raise TraceError(f"traced with {_show(path)}={value!r}: trace again for another value")
        wanted = set(self.inputs.values())
        for path in given.keys() - wanted:
            raise TraceError(f"traced without {_show(path)}: trace again with it")
        for path in wanted - given.keys():
            raise TraceError(f"traced with {_show(path)}: the call has none")
        SizeCheck(self)(given)
        return [given[path] for path in self.inputs.values()]

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """The model's own output from the graph's outputs (new values of mutated buffers are dropped)."""
        return pytree.tree_unflatten(list(outputs)[len(self.mutated_buffers) :], self.out_spec)

    def state(self, model: nn.Module) -> list[torch.Tensor]:
        """The model's tensors for the leading placeholders: parameters, buffers, constants."""
        return self.state_of(
            dict(
                itertools.chain(
                    model.named_parameters(remove_duplicate=False),
                    model.named_buffers(remove_duplicate=False),
                )
            )
        )

    def state_of(self, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """`state` of parameters and buffers by their names."""
        return [
            self.constants[name]
            if name in self.constants
            else torch.stack([tensors[fqn] for fqn in self.stacked[name]])
            if name in self.stacked
            else tensors[self.parameters.get(name) or self.buffers[name]]
            for name in (n.name for n in self.graph_module.graph.find_nodes(op="placeholder"))
            if name not in self.inputs
        ]

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the graph on one device with the model's own tensors. Buffers that it mutates are left
        alone."""
        return self.unflatten(self.graph_module(*self.state(model), *self.flatten(args, kwargs)))


# --- inputs -------------------------------------------------------------------------------------------------


def infer_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Example inputs of a model that reads token ids: `input_ids`, and `labels` where `forward` accepts
    them."""
    parameters = inspect.signature(model.forward).parameters
    if "input_ids" not in parameters:
        raise TraceError(
            f"{type(model).__name__}.forward({', '.join(parameters)}) takes no input_ids, so its inputs "
            "cannot be "
            "guessed: pass example inputs, as in trace(model, kwargs={'x': torch.randn(6, 10, 64)})"
        )
    ids = torch.zeros(6, 10, dtype=torch.int64)
    return {name: ids.clone() for name in ("input_ids", "labels") if name in parameters}


def _bind(signature: inspect.Signature, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The call by keyword. Positional arguments beyond the named ones are refused."""
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise TraceError(f"the inputs do not fit the model's forward: {error}") from None
    call = {}
    for name, value in bound.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            call.update(value)
        elif kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            raise TraceError(
                f"argument '{name}' of forward has no keyword: wrap the model in one whose inputs have names"
            )
        else:
            call[name] = value
    return call


def leaves_with_path(tree: Any) -> list[tuple[tuple, Any]]:
    leaves, _ = pytree.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
    return [
        (tuple(getattr(k, "key", getattr(k, "idx", getattr(k, "name", None))) for k in path), x)
        for path, x in leaves
    ]


def _show(path: tuple) -> str:
    return str(path[0]) + "".join(f"[{p!r}]" for p in path[1:])


# --- the model while it is traced ---------------------------------------------------------------------------


@contextlib.contextmanager
def _fake_state(model: nn.Module, mode: FakeTensorMode, device: torch.device) -> Iterator[None]:
    """Parameters and buffers swapped for fakes on `device`; a tied tensor stays tied."""
    fakes: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in fakes:
            with mode:
                new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            fakes[id(tensor)] = new
        return fakes[id(tensor)]

    saved = []
    try:
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        saved.append((table, name, tensor))
                        table[name] = fake(tensor)
        yield
    finally:
        for table, name, tensor in saved:
            table[name] = tensor


def _tied(model: nn.Module) -> dict[str, str]:
    """FQN -> the first FQN of the same tensor."""
    first: dict[int, str] = {}
    named = itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    return {name: first.setdefault(id(t), name) for name, t in named if first.setdefault(id(t), name) != name}


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
    given.
    """
    if frontends is None:
        from tedfx.frontends import default_frontends

        frontends = default_frontends()
    if not args and not kwargs:
        kwargs = infer_inputs(model)
    refuse_hooks(model)
    state = [*model.parameters(), *model.buffers()]
    if device is None:
        device = next((t.device for t in state if t.device.type != "meta"), torch.get_default_device())
    device = torch.device(device)
    if device.type not in ("cpu", "meta") and not torch.get_device_module(device).is_available():
        raise TraceError(f"device {device} is not available here: pass device='cpu' to trace without it")

    around = Autocast.around(device.type)
    signature = inspect.signature(model.forward)
    call = _bind(signature, tuple(args), dict(kwargs or {}))
    if reading is None:
        again = functools.partial(trace, model, args, kwargs, device=device, frontends=frontends)
        return settle(
            call, [_show(path) for path, _ in leaves_with_path(call)], lambda reading: again(reading=reading)
        )
    static: list[str] = []
    notes: list[str] = []
    taken = {size for t in model.parameters() for size in t.shape}
    sizes, leaf_roles, fixed = plan_sizes(call, taken, reading)
    static += fixed
    used = [f for f in frontends if f.applies(model)]

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    failure: Exception | None = None

    def example(x: Any, dims: dict[int, str] | None, plan: dict[str, int]) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        shape = [plan.get(dims.get(d), size) for d, size in enumerate(x.shape)]
        with mode:  # a new object each: export merges inputs that are one object
            return torch.empty(shape, dtype=x.dtype, device=device).requires_grad_(x.requires_grad)

    def shapes(x: Any, dims: dict[int, str] | None, free: dict[str, Any]) -> Any:
        return (
            {d: free[n] for d, n in dims.items() if n in free} or None
            if isinstance(x, torch.Tensor)
            else None
        )

    leaves, spec = pytree.tree_flatten(call)
    free: dict[str, Any] = {name: torch.export.Dim(name) for name in sizes}
    traced = {name: size for name, (_, size) in sizes.items()}
    observation = Observation(model)
    observation.remember([name for f in used for name in f.memories])
    with contextlib.ExitStack() as stack:
        for frontend in used:
            stack.enter_context(frontend.prepare(model, notes))
        captured = [name for f in used for name in f.captured(model)]
        stack.enter_context(_fake_state(model, mode, device))
        stack.enter_context(_named_forward(model, list(call)))
        stack.enter_context(region(around, device.type))
        stack.enter_context(NoGradInsideAutocast(__file__))
        line = functools.partial(line_below, __file__)
        stack.enter_context(refuse_side_gradients(line))
        stack.enter_context(kept_calls(device.type, line))
        # Attention stays one node whatever kernel runs it later; the fused kernels' shape functions on CUDA
        # would fix the length to their alignment.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        # Where opt_einsum is installed, torch asks it for the order of a product of three operands; it takes
        # sizes as numbers, which would fix them.
        stack.enter_context(torch.backends.opt_einsum.flags(enabled=False))
        stack.enter_context(frames_of_nodes(lambda frames: model_frames(frames, __file__)))
        stack.enter_context(observation.watching())
        deferred = False
        for attempt in itertools.count():
            plan = {n: traced[n] if n in free else sizes[n][0] for n in sizes}
            examples = spec.unflatten([example(x, r, plan) for x, r in zip(leaves, leaf_roles)])
            dynamic = spec.unflatten([shapes(x, r, free) for x, r in zip(leaves, leaf_roles)])

            def export():
                with quiet_export(), export_hooks():
                    return torch.export.export(
                        model,
                        (),
                        examples,
                        dynamic_shapes=dynamic,
                        strict=False,
                        prefer_deferred_runtime_asserts_over_guards=deferred,
                    )

            try:
                exported = export()
                observation.settle(str(exported.graph), lambda: str(export().graph))
                break
            except TraceError:  # a frontend's own, with the line
                raise
            except Exception as error:
                fixes = _suggested(str(error), free)
                if attempt == 6:
                    failure = error
                    break
                if (
                    not deferred
                    and "Constraints violated" in str(error)
                    and "Suggested fixes:" not in str(error)
                ):
                    # a condition that export cannot solve for a size: let it stand in the graph, see
                    # `_conditions`
                    deferred = True
                    continue
                if not fixes and traced != as_given(sizes):
                    traced = as_given(sizes)  # our sizes do not suit the model: the given ones
                elif not fixes:
                    failure = error
                    break
                for name, fix in fixes.items():
                    if isinstance(fix, int):
                        static.append(f"{name} = {sizes[name][0]}: the model fixes this size")
                        del free[name]
                    else:
                        static.append(f"{name}: the model only accepts {fix}")
                        free[name] = fix

    if failure is not None:
        own = own_error(
            model, call, used, around, lambda fakes: _fake_state(model, fakes, torch.device("cpu"))
        )
        raise (own or _trace_error(failure)) from failure
    flat = _flat(exported, model, signature, call, leaf_roles, free, static, notes, device, captured, around)
    return dataclasses.replace(flat, observed=observation.observed())


@contextlib.contextmanager
def _named_forward(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """`forward` with exactly these parameters, where some of them go through its `**kwargs`: export does not
    match the dynamic shapes of those."""
    forward, own = model.forward, "forward" in vars(model)
    if set(names) <= set(inspect.signature(forward).parameters):
        yield
        return

    def named(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    named.__signature__ = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    )
    model.forward = named
    try:
        yield
    finally:
        if own:
            model.forward = forward
        else:
            del model.forward


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
    if "Constraints violated" in text:
        fix = "pass example inputs with sizes that this line accepts"
    else:
        fix = "make this line traceable by torch.export, or take it out of forward"
    return TraceError(f"cannot trace: {type(error).__name__}: {cause} | at {where} | {fix}")


# --- the exported program, made flat ------------------------------------------------------------------------


def _renamed(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A placeholder whose name a copy of the graph would keep: `input`, `id` and other names of Python's own
    get a number there."""
    kept = fx.Graph().placeholder(node.name).name
    if kept == node.name:
        return node
    with graph.inserting_before(node):
        made = graph.placeholder(kept)
    made.meta = node.meta
    node.replace_all_uses_with(made)
    graph.erase_node(node)
    return made


def _flat(
    exported,
    model,
    signature,
    call,
    leaf_roles,
    free,
    static,
    notes,
    device,
    captured,
    around: Autocast | None,
) -> Trace:
    graph_module = fx.GraphModule(exported.graph_module, exported.graph_module.graph)
    graph = graph_module.graph
    inline_regions(graph_module)
    lowered = keep_calls(graph)
    conditions = _conditions(
        graph, {s for n in graph.find_nodes(op="placeholder") for s in _free_symbols(n.meta.get("val"))}
    )
    static.extend(f"the model only accepts sizes with {c}" for c in conditions)
    _count_into_fixed_bins(graph)
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _ASSERTIONS:
            graph.erase_node(node)

    placeholders = {n.name: n for n in graph.find_nodes(op="placeholder")}
    tied = _tied(model)
    parameters, buffers, constants, user = {}, {}, {}, []
    owner: dict[str, fx.Node] = {}
    for spec in exported.graph_signature.input_specs:
        name = spec.arg.name
        node = placeholders[name]
        if spec.kind is InputKind.USER_INPUT:
            user.append(node)
            continue
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            fqn = tied.get(spec.target, spec.target)
            if fqn in owner:
                node.replace_all_uses_with(owner[fqn])
                graph.erase_node(node)
                continue
            owner[fqn] = node
            (parameters if spec.kind is InputKind.PARAMETER else buffers)[name] = fqn
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            constants[name] = exported.constants[spec.target]
        else:
            where = user_line(next(iter(node.users), node))
            raise TraceError(
                f"input {name} is a {spec.kind.name.lower()} (a torch.Generator is one) | at {where} | "
                "only tensors can enter the graph: draw without a generator of your own"
            )
    for spec in exported.graph_signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise TraceError(
                f"output {spec.arg.name} is a {spec.kind.name.lower()}, which tedfx does not expect"
            )

    lowered |= explicit_casts(graph, device.type, around)
    inputs, values = {}, {}
    roles_of = {}
    for node, (path, value), roles in zip(user, leaves_with_path(call), leaf_roles, strict=True):
        if isinstance(value, torch.Tensor):
            node = _renamed(graph, node)
            inputs[node.name] = path
            roles_of[node] = roles
        else:
            values[path] = value
            graph.erase_node(node)

    graph.eliminate_dead_code()
    for name in [n for n, p in placeholders.items() if n in buffers or n in constants]:
        if not placeholders[name].users:  # an unread buffer needs no placeholder
            buffers.pop(name, None)
            constants.pop(name, None)
            graph.erase_node(placeholders[name])
    graph_module.delete_all_unused_submodules()
    graph.lint()
    graph_module.recompile()

    symbols, extents, bounds = {}, {}, {}
    for node, roles in roles_of.items():
        for dim, size_name in roles.items():
            size = node.meta["val"].shape[dim]
            if isinstance(size, torch.SymInt) and symbol_of(size) is not None:
                symbols[size_name], extents[size_name] = symbol_of(size), size.node.expr
    for name, symbol in symbols.items():
        dim = free.get(name)
        low, high = getattr(dim, "min", None), getattr(dim, "max", None)
        bounds[symbol] = (
            low if isinstance(low, int) and low > 2 else 1,
            high if isinstance(high, int) and high < 2**62 else None,
        )

    return Trace(
        graph_module=graph_module,
        parameters=parameters,
        tied=tied,
        buffers=buffers,
        constants=constants,
        inputs=inputs,
        in_spec=exported.call_spec.in_spec,
        out_spec=exported.call_spec.out_spec,
        training=model.training,
        signature=signature,
        sizes=symbols,
        extents=extents,
        bounds=bounds,
        static=static,
        notes=notes,
        values=values,
        device=device,
        captured=captured,
        conditions=conditions,
        autocast=around,
        lowered=lowered,
    )


def _free_symbols(val: Any) -> set[sympy.Symbol]:
    sizes = val.shape if isinstance(val, torch.Tensor) else ()
    return {s for size in sizes if isinstance(size, torch.SymInt) for s in size.node.expr.free_symbols}


def _conditions(graph: fx.Graph, of: set[sympy.Symbol]) -> list[sympy.Basic]:
    """What the graph asserts of the sizes of its inputs, less what holds of all of a sample (`min(8 s, 16 s)
    == 8 s`)."""
    found: dict[sympy.Basic, None] = {}
    for node in graph.find_nodes(op="call_function", target=aten._assert_scalar.default):
        val = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else None
        expr = val.node.expr if isinstance(val, torch.SymBool) else None
        if isinstance(expr, sympy.Basic) and expr.free_symbols and expr.free_symbols <= of:
            symbols = sorted(expr.free_symbols, key=str)
            samples = itertools.product((1, 2, 3, 4, 7, 8, 9, 16, 61, 512, 4097), repeat=len(symbols))
            if not all(expr.subs(dict(zip(symbols, sample))) == sympy.true for sample in samples):
                found[expr] = None
    return list(found)


def _bins(node: fx.Node) -> tuple[Any, int]:
    """(weights, minlength) of a bincount."""
    return tuple(
        node.args[i] if len(node.args) > i else node.kwargs.get(name, default)
        for i, name, default in ((1, "weights", None), (2, "minlength", 0))
    )


def _count_into_fixed_bins(graph: fx.Graph) -> None:
    """bincount(ids, minlength=E) has a size that is data. Where the graph asserts it to be E, it is a
    histogram of E bins."""
    asserted = {}
    for node in graph.find_nodes(op="call_function", target=aten._assert_scalar.default):
        val = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else None
        expr = val.node.expr if isinstance(val, torch.SymBool) else None
        if isinstance(expr, sympy.Eq) and expr.lhs.is_Symbol and expr.rhs.is_Integer:
            asserted[expr.lhs] = int(expr.rhs)
    stale: set[fx.Node] = set()  # their fake values still have the size that is data
    for node in list(graph.nodes):
        weights, bins = _bins(node) if node.target is aten.bincount.default else (None, 0)
        if bins and weights is None and asserted.get(node.meta["val"].shape[0].node.expr) == bins:
            with graph.inserting_before(node):
                exact = emit(graph, aten.to.dtype, (node.args[0], torch.float64), like=node)
                counts = emit(graph, aten.histc.default, (exact, bins, 0, bins), like=node)
                counts = emit(graph, aten.to.dtype, (counts, torch.int64), like=node)
            node.replace_all_uses_with(counts)
            stale.update(counts.users)
        elif node in stale and node.op == "call_function" and node.target not in _ASSERTIONS:
            node.meta["val"] = evaluate(graph, node.target, node.args, node.kwargs)
            stale.update(node.users)

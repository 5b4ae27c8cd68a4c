"""Every private torch import of tedfx, in one place, each with the public thing that would replace it.

The collectives below have no autograd. While compiling they are the functional ones, which `torch.compile`
traces into the graph and whose waits inductor may move; in eager mode they are torch.distributed's own. tedfx
gives every one of them its own adjoint (see `tedfx/ops/convert.py`), because the adjoint depends on what the
value means.
"""

import contextlib
import functools
import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

# Registers the `_c10d_functional` operators. Public replacement: none yet; `torch.distributed.all_reduce` and
# its kin work in place, which neither autograd.Function nor functionalisation wants.
import torch.distributed._functional_collectives  # noqa: F401
import torch.export._trace
import torch.fx.experimental.symbolic_shapes

# Trees of inputs and outputs. Public replacement: `torch.utils.pytree`, whose tree specs torch.export does
# not use yet.
import torch.utils._pytree as pytree  # noqa: F401

# As torch.distributed has them, where a type checker finds them. Public replacement of the second: passing
# the group itself.
from torch._C._distributed_c10d import Store, _resolve_process_group
from torch._dispatch.python import enable_python_dispatcher  # noqa: F401  public replacement: none; torch.export evaluates under it
from torch._ops import OpOverload  # noqa: F401  as torch.fx has it in its arguments; public replacement: none
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: F401  public replacement: none; torch.export takes one and makes none
from torch.distributed import distributed_c10d as c10d
from torch.distributed.tensor import DTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.proxy import TracerBase
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: F401  public replacement: none

# Real tensors while fake ones are traced. Public replacement: none.
from torch.utils._python_dispatch import _disable_current_modes as outside_of_trace  # noqa: F401
from torch.utils._sympy.functions import FloorDiv  # noqa: F401  as sizes of a trace have it; public replacement: sympy.floor of a quotient
from torch.utils.checkpoint import checkpoint

from tedfx.dtypes import as_real

# torch 2.13 renamed these two and warns of the old names; both are public.
gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_ops = torch.ops._c10d_functional
_REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


@contextlib.contextmanager
def frames_of_nodes(keep):
    """While export traces, the stack trace of a node has the frames that `keep` leaves of all of them,
    outermost first; torch itself keeps only those of functions named `forward`, so a helper method would have
    the line of its caller. Public replacement: none."""
    name, before = "_filter_traceback_frames", getattr(TracerBase, "_filter_traceback_frames", None)
    if before is None:
        yield
        return
    kept = lambda self, frames: traceback.StackSummary.from_list(keep(list(frames)))
    setattr(TracerBase, name, kept)
    try:
        yield
    finally:
        setattr(TracerBase, name, before)


@contextlib.contextmanager
def quiet_export():
    """What torch says of a model that it then refuses is not printed: the exception has it all. Warnings
    about a model that it accepts come when it is done. Public replacement: none; the loggers are found by
    name, and the partial graph is printed by torch.export's module."""
    if os.environ.get("TORCH_LOGS"):
        yield
        return
    held = []

    def hold(record):
        if record.levelno >= logging.WARNING:
            held.append(record)
        return record.levelno < logging.WARNING

    loggers = [
        logging.getLogger(name)
        for name in (
            "torch.fx.experimental.symbolic_shapes",
            "torch.fx.experimental.proxy_tensor",
            "torch.export._trace",
            "torch._export.non_strict_utils",
            "torch._subclasses.fake_tensor",
        )
    ]
    module = torch.export._trace
    own = hasattr(module, "print")
    for logger in loggers:
        logger.addFilter(hold)
    if not own:
        setattr(module, "print", lambda *args, **kwargs: None)
    try:
        yield
    except BaseException:
        held.clear()
        raise
    finally:
        if not own:
            delattr(module, "print")
        for logger in loggers:
            logger.removeFilter(hold)
        for record in held:
            logging.getLogger(record.name).handle(record)


@contextlib.contextmanager
def export_hooks():
    """A failed export leaves nothing behind: that of torch 2.11 leaves its hook on assigned buffers, which
    then fails wherever the model assigns one. Public replacement: torch 2.13."""
    hooks = torch.nn.modules.module._global_buffer_registration_hooks
    before = set(hooks)
    try:
        yield
    except BaseException:
        for left in hooks.keys() - before:
            del hooks[left]
        raise


_TORCH = os.path.dirname(torch.__file__)
_IN_BETWEEN = (torch.__file__, os.path.join(_TORCH, "fx", "experimental", "sym_node.py"), __file__)


def _asked_by_torch() -> bool:
    """Whether the code that asks for the value of a size is torch's own machinery: strides, checks of
    operators. Its layers and functions are as good as the model's code, and `min` and `max` of Python are the
    model's, though export has its own."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename in _IN_BETWEEN:
        frame = frame.f_back
    file = frame.f_code.co_filename
    inside = file.startswith(_TORCH + os.sep) and not file.startswith(os.path.join(_TORCH, "nn") + os.sep)
    return inside and frame.f_code.co_name != "_tensor_min_max"


@contextlib.contextmanager
def sizes_asked():
    """A list that gets (expression, answer) of whatever the model's Python asks of symbolic sizes while it is
    traced: it took one branch then, and another answer would have been another graph. Public replacement:
    none; an ExportedProgram's own module checks guards of which it makes no list, and export drops those over
    several sizes."""
    from torch.fx.experimental.sym_node import SymNode

    asked: list[tuple[Any, Any]] = []

    def noting(ask):
        def guard(self, file, line):
            expr, answer = self._expr, ask(self, file, line)
            if not _asked_by_torch():
                asked.append((expr, answer))
            return answer

        return functools.wraps(ask)(guard)

    names = ("guard_bool", "guard_int", "guard_float")
    before = {name: getattr(SymNode, name) for name in names}
    for name, ask in before.items():
        setattr(SymNode, name, noting(ask))
    try:
        yield asked
    finally:
        for name, ask in before.items():
            setattr(SymNode, name, ask)


def _plain(x: torch.Tensor) -> bool:
    """Whether the public collectives do: eager mode on a tensor with data. They cost the host about half of
    what the functional ones do."""
    return type(x) is torch.Tensor and not torch.compiler.is_compiling()


def _of_numbers(collective):
    """A collective of complex values is one of their real and imaginary parts: no backend is asked to know
    them, nor lazy conjugation and negation."""

    def of_numbers(x: torch.Tensor, *args):
        out = collective(as_real(x), *args)
        return torch.view_as_complex(out) if x.is_complex() else out

    return functools.wraps(collective)(of_numbers)


def _group(name: str) -> dist.ProcessGroup:
    """The group of this name. Public replacement: passing the group itself."""
    return _resolve_process_group(c10d.GroupName(name))


# The four collectives: `name` is that of the group, what comes back may be read. Public replacement of the
# traced forms: a public functional collective, `torch.distributed.nn.functional` without the autograd.
@_of_numbers
def all_reduce(x: torch.Tensor, op: str, name: str) -> torch.Tensor:
    """The "sum" or "max" of x over the ranks."""
    if not _plain(x):
        return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), op, name))
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, _REDUCTIONS[op], group=_group(name))
    return out


@_of_numbers
def all_gather(x: torch.Tensor, size: int, name: str) -> torch.Tensor:
    """x[n,..] of every rank, along dim 0: [size * n,..]."""
    if not _plain(x):
        return _ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous(), size, name))
    out = x.new_empty(size * x.shape[0], *x.shape[1:])
    gather_into(out, x.contiguous(), group=_group(name))
    return out


@_of_numbers
def reduce_scatter(x: torch.Tensor, size: int, name: str) -> torch.Tensor:
    """This rank's piece [n / size,..] of the sum of x[n,..] over the ranks."""
    if not _plain(x):
        return _ops.wait_tensor(_ops.reduce_scatter_tensor(x.contiguous(), "sum", size, name))
    out = x.new_empty(x.shape[0] // size, *x.shape[1:])
    scatter_into(out, x.contiguous(), group=_group(name))
    return out


@_of_numbers
def all_to_all(x: torch.Tensor, recv: list[int], send: list[int], name: str) -> torch.Tensor:
    """send[g] rows of x to each rank, recv[g] from each."""
    if not _plain(x):
        return _ops.wait_tensor(_ops.all_to_all_single(x.contiguous(), recv, send, name))
    out = x.new_empty(sum(recv), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), recv, send, group=_group(name))
    return out


# An assertion that runs on the device and does not make the host wait. Public replacement: none yet
# (torch._check looks at python values, torch._check_tensor_all would copy to the host).
assert_async: Callable[[torch.Tensor, str], None] = getattr(torch, "_assert_async")


@contextlib.contextmanager
def fake_world(rank: int, size: int):
    """A default process group of any size in this process alone: its collectives answer at once, with this
    rank's own data.

    Public replacement: none; the backend "fake" is registered by torch's testing package.
    """
    import torch.distributed._tools.fake_collectives  # noqa: F401  what collectives that work in place do to fake tensors
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def with_values():
    """A context manager under which tensors have values again where a FakeTensorMode is on. Public
    replacement: none; nor has the mode one."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


def memory_tracker():
    """A context manager that knows every storage alive under it, fake ones too. Public replacement: none;
    CUDA's own counters see no fake tensor."""
    from torch.distributed._tools.mem_tracker import MemTracker

    return MemTracker()


def group_name(group: dist.ProcessGroup) -> str:
    """The name under which the functional collectives find `group`. Public replacement: passing the group
    itself."""
    return group.group_name


def check(condition, message: str) -> None:
    """State a fact about sizes: a ValueError when it fails in eager mode, a hint to the symbolic shapes while
    tracing.

    Public replacement: `torch._check` under a public name.
    """
    if torch.compiler.is_compiling():
        torch._check(
            condition
        )  # the plainest form: the dynamo of torch 2.11 traces no message that is a closure
    elif not condition:
        raise ValueError(message)


def known(condition) -> bool:
    """Whether a fact about sizes holds, without asking: while compiling, a size that may vary is not tied to
    the answer.

    Public replacement: `statically_known_true` under a public name.
    """
    return torch.fx.experimental.symbolic_shapes.statically_known_true(condition)


def scratch_mode() -> FakeTensorMode:
    """A fake mode of its own, whose symbols (sizes that are data) are nobody else's. Public replacement:
    none, as for FakeTensorMode."""
    return FakeTensorMode(shape_env=ShapeEnv())


def hint(env, symbol, otherwise: int) -> int:
    """The size that a symbol had in the example that was traced; `otherwise` where it is data. Public
    replacement: none."""
    return int(env.backed_var_to_val.get(symbol, otherwise))


def inductor_options() -> dict:
    """What `torch.compile` is told where the user gives no options of his own. Public names all; the reasons
    are not.

    deterministic: inductor benchmarks reduction kernels on the device and may choose differently on each
    rank, so that replicas drift apart bit by bit. max_tiles: before torch 2.13 a kernel over two tiled dims
    divides by zero when one of them is empty (pytorch#178878), which a rank without routed rows makes of its
    rows.
    """
    options: dict = {"deterministic": True}
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        options["triton.max_tiles"] = 1
    return options


def checkpointed(function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)`, of which backward has the inputs only and runs it again; no generator's state is
    kept. All of it is public, but has no types."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


@contextlib.contextmanager
def functions_recompute():
    """Meanwhile, what `torch.compile` makes of a checkpointed region computes the forwards of its
    autograd.Functions again as well. torch 2.11 tags the operators beside them only and keeps all of theirs:
    the collectives of a region, and the weights that ZeRO gathers. Public replacement: torch 2.13, which tags
    what runs (it has no `tag_nodes`)."""
    from torch._functorch.autograd_function import autograd_function_apply
    from torch._higher_order_ops.wrap import TagActivationCheckpoint as cls

    own = vars(cls).get("tag_nodes")
    if own is None:
        yield
        return

    def tag_nodes(module, is_sac):
        own.__func__(module, is_sac)  # a staticmethod
        todo = [module]
        while todo:
            outside = todo.pop()
            for node in outside.graph.find_nodes(op="call_function", target=autograd_function_apply):
                inside = outside.get_submodule(node.args[0].target)
                for each in inside.graph.nodes:
                    if each.op in ("call_function", "call_method", "call_module"):
                        each.meta.update({key: node.meta[key] for key in ("ac_graph_id", "recompute")})
                todo.append(inside)
        return module

    setattr(cls, "tag_nodes", staticmethod(tag_nodes))
    try:
        yield
    finally:
        setattr(cls, "tag_nodes", own)


def size_max(a: int, b: int) -> int:
    """The larger size. While compiling by `max`: the dynamo of torch 2.11 knows no `torch.sym_max` of two
    numbers. Public replacement: torch.sym_max of torch 2.13."""
    return max(a, b) if torch.compiler.is_compiling() else cast(int, torch.sym_max(a, b))


def size_min(a: int, b: int) -> int:
    """The smaller size, likewise."""
    return min(a, b) if torch.compiler.is_compiling() else cast(int, torch.sym_min(a, b))


def count_of(x: torch.Tensor) -> int:
    """The whole number in a 0-dim tensor, for which the host waits. Public replacement: none needed,
    `x.item()` has the type of any number."""
    return cast(int, x.item())


# ---- state and gradients (tedfx/runtime/gradients.py, tedfx/ranks/meeting.py, tedfx/state/pieces.py) -------


def queue_callback(callback) -> None:
    """Run `callback` when the backward that is running ends. Public replacement: none yet; FSDP and DDP use
    the same."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


# The id of the backward that is running on this thread, -1 outside of one. Public replacement: none yet.
backward_id = torch._C._current_graph_task_id


def is_asked(node) -> bool:
    """Whether the backward that is running gives a gradient to a leaf, of which `node` is the AccumulateGrad.

    Public replacement: none yet.
    """
    try:
        return torch._C._will_engine_execute_node(node)
    except (
        RuntimeError
    ):  # torch does not answer for a leaf that autograd.grad was asked for, and for no other
        return True


Wrapped = TypeVar("Wrapped", bound=torch.Tensor)


def make_wrapper(cls: type[Wrapped], shape, dtype, device) -> Wrapped:
    """A tensor of type `cls` without storage. Public replacement: none; the documented way to write a tensor
    subclass."""
    return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)


def default_store() -> Store:
    """The key-value store through which the job met. Public replacement: making a store of our own, on a port
    of its own."""
    return dist.distributed_c10d._get_default_store()


def spec_of(dtensor: DTensor):
    """Mesh, placements and global shape of a DTensor, as one object. Public replacement: none."""
    return dtensor._spec


def dtensor_of(local: torch.Tensor, spec) -> DTensor:
    """`DTensor.from_local`, its public replacement, derives the same `spec` anew each time, which costs some
    100 us."""
    return DTensor(local, spec, requires_grad=False)


def result(x: torch.Tensor) -> torch.Tensor:
    """The output of an autograd.Function's forward, as a tensor object of its own.

    The dynamo of torch 2.11 returns every intermediate of a traced forward beside its output. Where the
    output is one of them (the result of an in-place op, of a cast that had nothing to do, of a wait) the
    gradient goes to the intermediate and is silently zero. A view is another tensor and costs nothing. Public
    replacement: torch 2.13.
    """
    return x.view_as(x)


def version_of(x: torch.Tensor) -> int:
    """How often the storage of `x` was written to in place. Public replacement: none; autograd's own check of
    saved tensors."""
    return x._version


# ---- a model's own initialisation (tedfx/state/one_at_a_time.py) -------------------------------------------


def is_view(func) -> bool:
    """Whether an operator returns views of its arguments. Public replacement: none; schemas are not
    public."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def written(func, args, kwargs) -> list:
    """The arguments that an operator writes to. Public replacement: none, as above."""
    named = [
        (a, args[i] if i < len(args) else kwargs.get(a.name)) for i, a in enumerate(func._schema.arguments)
    ]
    return [value for a, value in named if a.alias_info is not None and a.alias_info.is_write]


def op_name(func) -> str:
    """``normal_`` of ``aten::normal_``. Public replacement: none, as above."""
    return func._schema.name.split("::")[1]


def qualified_name(func: OpOverload) -> str:
    """``aten::view`` of ``aten.view.dtype``. Public replacement: none, as above."""
    return func._schema.name


def overload_name(func: OpOverload) -> str:
    """``dtype`` of ``aten.view.dtype``. Public replacement: none, as above."""
    return func._overloadname


def schema_arguments(func: OpOverload) -> list[torch.Argument]:
    """Name and default of each argument, in order. Public replacement: none, as above."""
    return list(func._schema.arguments)


def storage_key(x: torch.Tensor) -> int:
    """Equal for tensors of one memory, fake ones and those without data too. Public replacement: none;
    `data_ptr` is 0 where there is no data."""
    return x.untyped_storage()._cdata


set_grad_enabled_function = torch._C._set_grad_enabled
"""What no_grad and enable_grad call, as a TorchFunctionMode sees it.

Public replacement: none; torch.set_grad_enabled is a class that calls it."""


# ---- what a model holds beside its tables (tedfx/trace/held.py, tedfx/trace/hooks.py, tedfx/trace/observed.p

MODULE_ATTRIBUTES = frozenset(vars(torch.nn.Module()))
"""Attributes of a bare module: tables, hooks and flags of torch's own.

Public replacement: none needed, no name is spelled here."""


def backward_hooks(x) -> list[str]:
    """Which kinds of backward hooks are registered on a tensor or a module, by the name of what registers
    them. Public replacement: none; hooks can be registered, not listed."""
    if isinstance(x, torch.Tensor):
        kinds = {
            "_backward_hooks": "register_hook",
            "_post_accumulate_grad_hooks": "register_post_accumulate_grad_hook",
        }
    else:
        kinds = {
            "_backward_hooks": "register_full_backward_hook",
            "_backward_pre_hooks": "register_full_backward_pre_hook",
        }
    return [kind for attribute, kind in kinds.items() if getattr(x, attribute, None)]


def global_backward_hooks() -> list[str]:
    """The same of hooks on all modules. Public replacement: none, as above."""
    module = torch.nn.modules.module
    kinds = {
        "_global_backward_hooks": "register_module_full_backward_hook",
        "_global_backward_pre_hooks": "register_module_full_backward_pre_hook",
    }
    return [kind for attribute, kind in kinds.items() if getattr(module, attribute, None)]


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether `torch.compile(module)` made it, or `module.compile()` was called on it. Public replacement:
    none."""
    return (
        isinstance(module, torch._dynamo.OptimizedModule)
        or getattr(module, "_compiled_call_impl", None) is not None
    )


@contextlib.contextmanager
def around_call(module: torch.nn.Module, wrap):
    """While it is open, a call of this module, its forward hooks included, goes through `wrap(call)`. By its
    class, as export calls a stand-in that shares the module's attributes. Public replacement: none; forward
    hooks do not see each other."""
    cls, inside = type(module), []
    original = cls._call_impl

    def call(self, *args, **kwargs):
        if inside or self.__dict__ is not module.__dict__:
            return original(self, *args, **kwargs)
        inside.append(True)
        try:
            return wrap(lambda: original(self, *args, **kwargs))
        finally:
            inside.pop()

    own = vars(cls).get("_call_impl")
    cls._call_impl = call
    try:
        yield
    finally:
        if own is None:
            del cls._call_impl
        else:
            cls._call_impl = own


# ---- autograd.Function (tedfx/trace/functions.py, tedfx/trace/bodies.py) -----------------------------------


@contextlib.contextmanager
def every_apply(apply, transformed):
    """Meanwhile, `Function.apply(*args)` of every class, bound before or not, is `apply(cls, plain, *args)`;
    `plain` is torch's own of that class. Under a transform of torch.func it is `transformed(cls, plain,
    *args)`. Public replacement: none."""
    from torch.autograd import function

    base, before = function._SingleLevelFunction, vars(function)["custom_function_call"]

    def own(cls, *args, **kwargs):
        plain = getattr(super(base, cls), "apply")
        return apply(cls, functools.partial(plain), *args, **kwargs)

    def call(cls, *args, **kwargs):
        return transformed(cls, functools.partial(before, cls), *args, **kwargs)

    setattr(base, "apply", classmethod(own))
    setattr(function, "custom_function_call", call)
    try:
        yield
    finally:
        delattr(base, "apply")
        setattr(function, "custom_function_call", before)


def recording() -> bool:
    """Whether torch.export records what is called now, rather than running inside of an operator. Public
    replacement: none."""
    return torch._ops._get_dispatch_mode_pre_dispatch(torch._C._TorchDispatchModeKey.PROXY) is not None


def without_recording():
    """A context manager under which torch.export records nothing. Public replacement: none."""
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    return disable_proxy_modes_tracing()


@contextlib.contextmanager
def every_vmap(run):
    """Meanwhile, what `torch.vmap(..)` makes is called as `run(plain)`, where `plain()` is torch's own call.
    Public replacement: none."""
    from torch._functorch import apis

    before = vars(apis)["vmap_impl"]

    def own(*args, **kwargs):
        return run(functools.partial(before, *args, **kwargs))

    setattr(apis, "vmap_impl", own)
    try:
        yield
    finally:
        setattr(apis, "vmap_impl", before)


def learns(x: torch.Tensor) -> bool:
    """Whether a gradient of `x` is wanted, through the transforms of torch.func that run. Public replacement:
    none."""
    functorch = vars(torch._C)["_functorch"]
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    return x.requires_grad


def no_torch_function():
    """A context manager under which no TorchFunctionMode sees a call. Public replacement: none."""
    return torch._C.DisableTorchFunction()


def _symbols_of(mode: FakeTensorMode) -> ShapeEnv:
    env = mode.shape_env
    if env is None:
        raise ValueError("this FakeTensorMode was made without a ShapeEnv, so it has no symbols")
    return env


def symbolic_tensor(
    mode: FakeTensorMode, sizes, dtype: torch.dtype, device: torch.device, known: dict
) -> torch.Tensor:
    """A fake tensor of `mode`; `sizes` are ints, which stay, or pairs (key, hint): one symbol per key, kept
    in `known`. Public replacement: none."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    env = _symbols_of(mode)
    for size in sizes:
        if not isinstance(size, int) and size not in known:
            source = ConstantSource(f"size{len(known)}")
            symbol = env.create_symbol(size[1], source=source, dynamic_dim=DimDynamic.DYNAMIC)
            known[size] = env.create_symintnode(symbol, hint=size[1], source=source)
    with mode:
        return torch.empty(
            [size if isinstance(size, int) else known[size] for size in sizes], dtype=dtype, device=device
        )


def restricted(mode: FakeTensorMode) -> set:
    """The size symbols about which something was asked. Public replacement: none."""
    env = _symbols_of(mode)
    found = set(env.replacements)
    for guard in env.guards:
        found |= guard.expr.free_symbols
    return found


@contextlib.contextmanager
def levels_of_func(opened):
    """Meanwhile, `opened()` is called when torch.func has opened a level of differentiation (grad, vjp,
    jacrev; jvp, jacfwd), which it closes whatever `opened` raises. Public replacement: none."""
    from torch._functorch import eager_transforms

    names = ("_grad_increment_nesting", "_jvp_increment_nesting")
    before = {name: getattr(eager_transforms, name) for name in names}

    def noticing(name):
        def increment(*args):
            level = before[name](*args)
            opened()
            return level

        return increment

    for name in names:
        setattr(eager_transforms, name, noticing(name))
    try:
        yield
    finally:
        for name in names:
            setattr(eager_transforms, name, before[name])


def piece_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's own tensor of a DTensor. Public replacement: `to_local()` without gradients, which costs
    the host some ten times as much; an optimizer asks for it several times per parameter and step."""
    return cast(DTensor, tensor)._local_tensor


# Many tensors in one launch. Public replacement: none; torch.optim and clip_grad_norm_ are built of them.


def norms(tensors: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """The 2-norm of each, summed in `dtype`."""
    return list(torch._foreach_norm(tensors, 2, dtype))  # pyright: ignore[reportPrivateImportUsage]


def add_to_all(tensors: list[torch.Tensor], number: float) -> None:
    """Add the number to each, in place."""
    torch._foreach_add_(tensors, number)  # pyright: ignore[reportPrivateImportUsage]

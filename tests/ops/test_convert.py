"""Every conversion, forward and backward, against its meaning.

A global tensor is laid out on the ranks as a type: R and I are copies, S are pieces, P are random summands.
After a conversion the ranks' outputs, put together as the output type, must be the global tensor again. The
output's cotangent is laid out as the cotangent type (R <-> P, I <-> I, S <-> S), and the inputs' gradients,
put together as the source's cotangent type, must be the global cotangent. That is the whole specification.
"""

from itertools import accumulate

import pytest
import torch

from tedfx.ops import context, convert
from tedfx.ops.cuts import lengths_of
from tests import pool
from tests.marks import slow

COTANGENT = {"R": "P", "P": "R", "I": "I", "S": "S"}

# name -> (source, result, call)
CONVERSIONS = {
    "all_reduce": ("P", "I", lambda x, axes, dim, outer, whole: convert.all_reduce(x, axes)),
    "sum_gradient": ("I", "R", lambda x, axes, dim, outer, whole: convert.sum_gradient(x, axes)),
    "all_gather_R": (
        "S",
        "R",
        lambda x, axes, dim, outer, whole: convert.all_gather(x, axes, dim, outer, to="R", whole=whole),
    ),
    "all_gather_I": (
        "S",
        "I",
        lambda x, axes, dim, outer, whole: convert.all_gather(x, axes, dim, outer, to="I", whole=whole),
    ),
    "reduce_scatter": (
        "P",
        "S",
        lambda x, axes, dim, outer, whole: convert.reduce_scatter(x, axes, dim, outer, pieces=_pieces(whole)),
    ),
    "shard_R": (
        "R",
        "S",
        lambda x, axes, dim, outer, whole: convert.shard(
            x, axes, dim, outer, source="R", pieces=_pieces(whole)
        ),
    ),
    "shard_I": (
        "I",
        "S",
        lambda x, axes, dim, outer, whole: convert.shard(
            x, axes, dim, outer, source="I", pieces=_pieces(whole)
        ),
    ),
    "partial_R": ("R", "P", lambda x, axes, dim, outer, whole: convert.partial(x, axes, source="R")),
    "partial_I": ("I", "P", lambda x, axes, dim, outer, whole: convert.partial(x, axes, source="I")),
}

# (world, mesh shape, names, axes of the conversion)
LAYOUTS = [
    (2, (2,), ("t",), ("t",)),
    (4, (4,), ("t",), ("t",)),
    (4, (2, 2), ("a", "b"), ("a",)),
    (4, (2, 2), ("a", "b"), ("b",)),
    (4, (2, 2), ("a", "b"), ("a", "b")),
    (4, (2, 2), ("a", "b"), ("b", "a")),
    (4, (2, 1, 2), ("a", "one", "b"), ("b", "one")),
    (2, (1, 2), ("one", "b"), ("one",)),
]
# (dim, outer): every position, fused dims, and a dim counted from the end
CUTS = [(0, 1), (1, 1), (2, 1), (-1, 3), (0, 2), (1, 2)]
# The second divides by its outers only: unequal pieces, over four ranks some of them empty.
SHAPES = [(8, 16, 12), (6, 10, 9)]


def _pieces(whole):
    """Those of parameters."""
    return whole if isinstance(whole, tuple) else None


def _piece(x, size, index, dim, outer, given):
    whole = x.shape[dim] // outer
    starts = [whole * i // size for i in range(size + 1)] if given is None else [0, *accumulate(given)]
    start, stop = starts[index], starts[index + 1]
    return torch.cat([block.narrow(dim, start, stop - start) for block in x.chunk(outer, dim)], dim)


def _lay_out(x, kind, size, index, dim, outer, generator, given):
    """This coordinate's local tensor of the global x, as a fresh, sometimes strided, tensor."""
    if kind == "S":
        return _piece(x, size, index, dim, outer, given)
    if kind == "P":
        parts = torch.randn(size - 1, *x.shape, dtype=x.dtype, generator=generator)
        return parts[index] if index < size - 1 else x - parts.sum(0)
    return x.mT.contiguous().mT  # same values, other strides


def _together(locals_, kind, dim, outer):
    """The global tensor that the locals, by coordinate, stand for. R and I must agree on all."""
    if kind == "S":
        blocks = [local.chunk(outer, dim) for local in locals_]
        return torch.cat([torch.cat([block[o] for block in blocks], dim) for o in range(outer)], dim)
    if kind == "P":
        return torch.stack(locals_).sum(0)
    for local in locals_[1:]:
        assert torch.equal(local, locals_[0]), "replicas differ"
    return locals_[0]


def _globals(group, of):
    generator = torch.Generator().manual_seed(17 + group)
    x = torch.randn(of, dtype=torch.float64, generator=generator)
    return x, torch.randn(of, dtype=torch.float64, generator=generator), generator


def _on_rank(shape, names, axes, of, parameters):
    ctx = pool.context(shape, names, (axes,))
    size, index = ctx.size(axes), ctx.coordinate(axes)
    group = ctx.coordinate(tuple(name for name in names if name not in axes))
    out = {}
    for name, (source, result, call) in CONVERSIONS.items():
        for dim, outer in CUTS:
            x, cotangent, generator = _globals(group, of)
            whole = of[dim] // outer
            given = lengths_of(whole, [ctx.sizes[axis] for axis in axes]) if parameters else None
            local = _lay_out(x, source, size, index, dim, outer, generator, given).requires_grad_()
            seed = _lay_out(cotangent, COTANGENT[result], size, index, dim, outer, generator, given)
            with context.use(ctx):
                y = call(local, axes, dim, outer, given or whole)
            y.backward(seed)  # the context is gone, and backward has a thread of its own
            out[name, dim, outer] = (y.detach(), local.grad)
    return group, index, out


@pytest.mark.parametrize(
    "of,parameters",
    [slow(SHAPES[0], False), (SHAPES[1], False), (SHAPES[1], True)],
    ids=["even", "uneven", "parameters"],
)
@pytest.mark.parametrize("world,shape,names,axes", LAYOUTS)
def test_conversions(ranks, world, shape, names, axes, of, parameters):
    answers = ranks(world).run(_on_rank, shape, names, axes, of, parameters)
    for group in {answer[0] for answer in answers}:
        x, cotangent, _ = _globals(group, of)
        members = sorted((a for a in answers if a[0] == group), key=lambda a: a[1])
        for (name, dim, outer), _ in members[0][2].items():
            source, result, _ = CONVERSIONS[name]
            outs = [member[2][name, dim, outer] for member in members]
            label = f"{name} dim {dim} outer {outer}: "
            say = lambda message: label + message  # noqa: B023, E731
            torch.testing.assert_close(_together([o[0] for o in outs], result, dim, outer), x, msg=say)
            torch.testing.assert_close(
                _together([o[1] for o in outs], COTANGENT[source], dim, outer), cotangent, msg=say
            )


def _dtypes_on_rank():
    ctx = pool.context((2,), ("t",))
    axes, index = ("t",), ctx.coordinates["t"]
    with context.use(ctx):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32):
            ones = torch.ones(4, 2, dtype=dtype)
            assert torch.equal(convert.all_reduce(ones, axes), ones * 2)
            assert torch.equal(convert.reduce_scatter(ones, axes, 0), ones[:2] * 2)
            assert torch.equal(convert.all_gather(ones * index, axes, 1)[0], ones.new_tensor([0, 0, 1, 1]))
        flags = torch.tensor([index == 0, True])
        assert convert.all_gather(flags, axes, 0).tolist() == [True, True, False, True]
        assert convert.shard(torch.arange(6), axes, 0).tolist() == [[0, 1, 2], [3, 4, 5]][index]
        # an empty local tensor, and a scalar
        assert convert.all_gather(torch.ones(0, 3), axes, 0).shape == (0, 3)
        assert convert.all_gather(torch.ones(2, 0), axes, 0).shape == (4, 0)
        assert convert.all_reduce(torch.tensor(3.0), axes).item() == 6.0


def test_dtypes_and_empty_tensors(ranks):
    ranks(2).run(_dtypes_on_rank)


def _errors_on_rank():
    x = torch.ones(6, 4)
    ctx = pool.context((2,), ("t",))
    with pytest.raises(RuntimeError, match="no tedfx run-time context is active"):
        convert.all_reduce(x, ("t",))
    with context.use(ctx):
        with pytest.raises(ValueError, match=r"dim 0 of shape \(6, 4\) does not divide into 4 runs"):
            convert.shard(x, ("t",), 0, 4)
        with pytest.raises(ValueError, match="does not divide"):
            convert.reduce_scatter(torch.ones(3), ("t",), 0, 2)
        with pytest.raises(ValueError, match="source must be 'R' or 'I'"):
            convert.shard(x, ("t",), 0, source="P")
        with pytest.raises(ValueError, match="dim 2 of a tensor of shape"):
            convert.all_gather(x, ("t",), 2)
        with pytest.raises(TypeError, match="bool"):
            convert.all_reduce(x > 0, ("t",))
        with pytest.raises(KeyError, match="bogus"):
            convert.all_reduce(x, ("bogus",))


def test_errors(ranks):
    ranks(2).run(_errors_on_rank)

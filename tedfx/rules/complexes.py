"""Complex values: their parts, their views as real ones, and Fourier transforms. What is elementwise is in
`pointwise.py`, products and sums are those of real values.

A partial sum passes what is additive, which is less than linear over complex numbers: parts and conjugation
pass one. A cotangent of a complex value is that of its two parts (torch's convention), so types of
cotangents, and the adjoint of every conversion, are those of real values.
"""

from __future__ import annotations

from torch import fx

from tedfx.graph.nodes import argument, op_name, operands
from tedfx.placement.factors import Dim, Factor
from tedfx.rules.base import Annotator, Relation, as_list, flat, rule, shape_of

ONE = (frozenset({0}),)


@rule(
    "aten.real",
    "aten.imag",
    "aten.conj",
    "aten._conj",
    "aten.conj_physical",
    "aten._conj_physical",
    "aten.resolve_conj",
    "aten.resolve_neg",
    "aten._neg_view",
)
def part(node: fx.Node, ctx: Annotator) -> Relation:
    return Relation(out=ctx.dims(operands(node)[0]), linear=ONE)


@rule("aten.view_as_real")
def view_as_real(node: fx.Node, ctx: Annotator) -> Relation:
    """``(..) -> (.., 2)``."""
    new = (Factor(2, "re|im"),)
    return Relation(out=[*ctx.dims(operands(node)[0]), new], linear=ONE, created=new)


@rule("aten.view_as_complex")
def view_as_complex(node: fx.Node, ctx: Annotator) -> Relation:
    """``(.., 2) -> (..)``: both parts are needed."""
    dims = ctx.dims(operands(node)[0])
    return Relation(out=dims[:-1], whole={0: dims[-1]}, linear=ONE)


@rule("aten.complex", "aten.polar")
def from_parts(node: fx.Node, ctx: Annotator) -> Relation:
    """Two real values; `complex` is additive in both together, `polar` in the length."""
    from tedfx.rules.pointwise import broadcast

    return Relation(
        out=broadcast(ctx, operands(node)),
        linear=(frozenset({0, 1}),) if op_name(node) == "aten.complex" else ONE,
    )


_ONE_DIM = ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")
_SHIFTS = ("fftshift", "ifftshift")
_SEVERAL = (
    "fft2",
    "ifft2",
    "rfft2",
    "irfft2",
    "hfft2",
    "ihfft2",
    "fftn",
    "ifftn",
    "rfftn",
    "irfftn",
    "hfftn",
    "ihfftn",
)


@rule(*(f"aten.fft_{name}" for name in (*_ONE_DIM, *_SHIFTS, *_SEVERAL)))
def fourier(node: fx.Node, ctx: Annotator) -> Relation:
    """Additive; the transformed dims are whole, others pass."""
    x, name = operands(node)[0], op_name(node).removeprefix("aten.fft_")
    dims, shape = ctx.dims(x), shape_of(node)
    if name in _SHIFTS:
        listed = argument(node, 1, "dim")
    else:
        listed = argument(
            node, 2, "dim", -1 if name in _ONE_DIM else [-2, -1] if name.endswith("2") else None
        )
    if listed is None:
        given = None if name in _SHIFTS else argument(node, 1, "s")
        listed = range(-len(given) if given is not None else -len(dims), 0)
    touched = {d % len(dims) for d in as_list(listed)}
    created: dict[int, Dim] = {d: () if shape[d] == 1 else (Factor(shape[d]),) for d in touched}
    out = [created.get(d, dim) for d, dim in enumerate(dims)]
    return Relation(
        out=out,
        whole={0: flat(dims[d] for d in touched)},
        linear=ONE,
        created=flat(created[d] for d in touched),
        filled=True,
    )

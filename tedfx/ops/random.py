"""Random draws that are a function of (seed, site, global element index), and of nothing else.

A generator's stream depends on how many numbers each rank drew before. Here every element hashes its own
position in the global tensor: ranks that hold the same element draw the same number, ranks that hold
different ones draw independent numbers, and the whole is the one a single device draws, on any mesh.
Recomputation draws it again.

`factors` says where the local tensor lies in the global one: per dim, a tuple of factors `(local_size,
axes)`, major first. A factor's global index is coordinate(axes) * local_size + local index, its global size
local_size * size(axes); the dim's index composes its factors in mixed radix with the global sizes. `(((4,
("dp",)),), ((2, ()), (3, ("tp",))))` is a local [4, 6] of which dim 0 is sharded over dp, and dim 1 is
gate|up with each half sharded over tp.

A factor `(local_size, axes, whole, SHARE)` is this coordinate's share of `whole`, which the ranks need not
divide; a tuple: the shares of all.

Routed rows lie anywhere, and how many a rank holds is data. What a row is in the global batch is the number
of its assignment, token * k + choice, with the token counted in the global order (`row_numbers`). It travels
beside the rows, and a factor `(numbers, tokens, k, NUMBERED)` takes it as the index; `tokens` are the factors
of the dim of tokens.
"""

import torch
from torch import Tensor

from tedfx.ops import context
from tedfx.ops.convert import bounds
from tedfx.ops.distributions import DISTRIBUTIONS, drawable, shift_right, wide
from tedfx.ops.properties import op

Factors = tuple[tuple[tuple, ...], ...]
SHARE, NUMBERED = "share", "numbered"


@op(saves=())
def draw(
    distribution: str,
    parameters: tuple,
    seed: Tensor,
    site: int,
    factors: Factors,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Tensor:
    """The local piece of a global tensor of independent draws, one dim per entry of `factors`.

    `distribution`: a name in `tedfx/ops/distributions.py`, and its `parameters`: numbers, or tensors that
    broadcast to the local shape; none of them gets a gradient. `seed`: 0-dim int64 tensor, equal on all
    ranks; new values do not recompile. `site`: which of the model's draws. `device`: that of the seed by
    default. ValueError for a dtype without draws.
    """
    if not drawable(dtype):
        raise ValueError(f"no draws of {dtype}")
    parameters = tuple(p.detach() if isinstance(p, Tensor) else p for p in parameters)
    hashed = _hash(factors, seed.to(device or seed.device), site)
    return DISTRIBUTIONS[distribution].value(hashed, dtype, *parameters)


@op(saves=())
def dropout(x: Tensor, p: float, seed: Tensor, site: int, factors: Factors) -> Tensor:
    """x with each element kept with probability 1 - p and scaled by 1 / (1 - p), else zero.

    Element i of the global tensor is kept iff its uniform float32 draw is at least p. ValueError for p
    outside [0, 1] or factors that do not multiply to x's shape.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability {p} is not in [0, 1]")
    if len(factors) != x.dim():
        raise ValueError(f"dropout: factors for {len(factors)} dims of a tensor of shape {tuple(x.shape)}")
    for dim, parts in enumerate(factors):
        size = 1
        for local, *_ in parts:
            size = size * (local.shape[0] if isinstance(local, Tensor) else local)
        if size != x.shape[dim]:
            raise ValueError(
                f"dropout: factors {parts} do not multiply to dim {dim} of shape {tuple(x.shape)}"
            )
    keep = draw("uniform", (0.0, 1.0), seed, site, factors, device=x.device) >= p
    return torch.where(keep, x * (0.0 if p == 1.0 else 1.0 / (1.0 - p)), 0)


@op(saves=(), decides=True)
def multinomial(
    weights: Tensor, count: int, replacement: bool, seed: Tensor, site: int, factors: Factors
) -> Tensor:
    """weights[.., E] -> [.., count] int64: numbers in 0..E-1, each drawn in proportion to its weight.

    The first of E exponential clocks that rings is as likely the i-th as its rate has a share in all, and the
    first few in order are draws without replacement (so does torch itself). With replacement each choice has
    clocks of its own. `factors`: those of the clocks, [.., count, E] or without replacement [.., E].
    """
    clocks = draw("exponential", (1.0,), seed, site, factors, wide(weights.dtype), weights.device)
    if replacement:
        return (weights.detach().unsqueeze(-2) / clocks).argmax(-1)
    return (weights.detach() / clocks).topk(count, -1).indices


@op(saves=())
def row_numbers(order: Tensor, top_k: int, tokens: tuple[tuple, ...]) -> Tensor:
    """order[M], assignments of this rank's tokens -> [M] int64: their numbers in the global batch, token *
    top_k + choice.

    `tokens`: where this rank's tokens lie in the global dim of tokens, factors as `draw` takes them. Of an
    empty slot, whose assignment is one past the last, a number that means nothing.
    """
    rest, token, radix = order // top_k, 0, 1
    for part in reversed(tokens):
        start, whole = _piece(part)
        token = token + (rest % part[0] + start) * radix
        rest, radix = rest // part[0], radix * whole
    return token * top_k + order % top_k


# ---- splitmix64 in wrapping int64 arithmetic ---------------------------------------------------------------


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >> 63 else constant


_SITE = 0x632BE59BD9B4E019
_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))


def _hash(factors: Factors, seed: Tensor, site: int) -> Tensor:
    """64 random bits per local element, a function of (seed, site, row-major index in the global tensor).

    The index is composed on top of the key, key * (global number of elements) + index, and not apart from it:
    an index that is affine in the loop variables would be computed by inductor in 32 bits. The product may
    drop high bits of the key (a power of two of elements shifts them out), so the key is added again between
    the two mixes.
    """
    key = _mix(_mix(seed + _GOLDEN) + _signed((site + 1) * _SITE & (1 << 64) - 1))
    counter, shape = key, []
    for parts in factors:
        size = 1
        for part in parts:
            if part[-1] == NUMBERED:
                place, tokens, whole, _ = part
                for each in tokens:
                    whole = whole * _piece(each)[1]
            else:
                start, whole = _piece(part)
                place = torch.arange(part[0], device=seed.device, dtype=torch.int64) + start
            counter = counter.unsqueeze(-1) * whole + place
            size = size * place.shape[0]
        shape.append(size)
    return _mix(_mix(counter.reshape(shape)) + key)


def _piece(part: tuple) -> tuple[int, int]:
    """(where this coordinate's piece of a factor begins, size of the whole factor)."""
    local, axes, *share = part
    span = context.span(axes)
    if share:
        starts = bounds(share[0], span)
        return starts[span.index], starts[-1]
    return span.index * local, local * span.size


def _mix(z: Tensor) -> Tensor:
    for shift, factor in _MIX:
        z = (z ^ shift_right(z, shift)) * factor
    return z ^ shift_right(z, 31)

"""An expert layer in single-device form and in local form, for the tests of the run-time ops."""

from dataclasses import dataclass

import torch

from tedfx.ops import context, convert, moe

E, K, H, F = 8, 2, 6, 10


@dataclass(frozen=True)
class Roles:
    """What each axis does to the layer. Experts split over `expert`, major first; tokens differ over
    `tokens`, are replicated over the rest. An axis of `expert` is either in `exchange` (rows travel) or in
    `owned` (rows stay)."""

    expert: tuple[str, ...]
    tokens: tuple[str, ...] = ()
    exchange: tuple[str, ...] = ()
    owned: tuple[str, ...] = ()
    lanes: tuple[str, ...] = ()


def whole(x, ids, weights, up, bias, down):
    """The layer on one device: x[N,H], ids[N,K], weights[N,K], up[E,F,H], bias[E,F], down[E,F,H]
    transposed."""
    rows, counts, order = moe.dispatch(x, ids, up.shape[0])
    return moe.combine(_body(rows, counts, up, bias, down), order, weights)


def plain(x, ids, weights, up, bias, down):
    """The same in plain torch, by gathered weights."""
    h = torch.relu(torch.einsum("nh,nkfh->nkf", x, up[ids]) + bias[ids])
    return (torch.einsum("nkf,nkfh->nkh", h, down[ids]) * weights.unsqueeze(-1)).sum(1)


def _body(rows, counts, up, bias, down):
    h = moe.grouped_linear(rows, up, counts) + moe.expert_rows(bias, counts, rows)
    return moe.grouped_linear(torch.relu(h), down, counts, True)


def local(x, ids, weights, up, bias, down, roles):
    """The layer on one rank: x, ids and weights are its tokens, up, bias and down its experts' shard."""
    experts = up.shape[0] * context.span(roles.expert).size
    replicated = roles.owned + tuple(axis for axis in roles.lanes if axis not in roles.owned)
    # Over these axes a rank works on some of the assignments only: x and weights get partial gradients.
    x, weights = convert.sum_gradient(x, replicated), convert.sum_gradient(weights, replicated)
    spread = tuple(axis for axis in roles.lanes if axis not in roles.expert)  # experts replicated over these
    up, bias, down = (convert.sum_gradient(w, spread) for w in (up, bias, down))

    owned_first = roles.expert[: len(roles.owned)] == roles.owned
    outer = 1 if owned_first else context.span(roles.exchange).size
    order, counts = moe.route(ids, experts, owned=roles.owned, lanes=roles.lanes, owned_outer=outer)
    if roles.owned and owned_first:
        counts = moe.local_counts(counts, roles.owned)
    rows = moe.permute_rows(x, order, ids.shape[1])
    if roles.exchange:
        send, recv, recv_counts, counts = moe.exchange_counts(counts, roles.exchange)
        rows = moe.all_to_all_single(rows, recv, send, roles.exchange)
        index = moe.expert_major(recv_counts, recv)
        rows = moe.index_rows(rows, index)
    if roles.owned and not owned_first:
        counts = moe.local_counts(counts, roles.owned)
    rows = _body(rows, counts, up, bias, down)
    if roles.exchange:
        rows = moe.all_to_all_single(moe.unindex_rows(rows, index), send, recv, roles.exchange)
    return convert.all_reduce(moe.combine(rows, order, weights), replicated)

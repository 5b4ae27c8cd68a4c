"""The buffers of slots that a model fills at addresses, and what reads them (terms: scattered.py)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from tedfx.capture.chains import is_zero
from tedfx.capture.routing import Dims, argument, name_of, shape_of
from tedfx.capture.scattered import Read, Scattered, Write, covers, refuse
from tedfx.capture.slot_masks import between
from tedfx.capture.slots import Term, shared_slot
from tedfx.graph.nodes import REGROUPS, operand, reached_from
from tedfx.placement.sizes import Size, as_size

__all__ = ["Buffer", "buffers", "has_buffers", "reads"]

_WRITES = ("index_put", "index_copy", "index_add", "scatter", "scatter_add", "scatter_reduce")
_UNFILLED = ("empty", "new_empty", "empty_like")


def has_buffers(graph: fx.Graph) -> bool:
    """Whether any row is written into a fresh value."""
    return any(name_of(n) in _WRITES and _is_fresh(operand(n, 0)) for n in graph.nodes)


def _is_fresh(node: fx.Node) -> bool:
    return is_zero(node) or name_of(node) in _UNFILLED


@dataclass
class Buffer:
    """The slots [E, C, H] or [E * C, H] at `node`, `size` each, with what was written to them."""

    writes: list[Write]
    terms: list[Term]
    node: fx.Node
    labels: Dims
    size: Size


def buffers(graph: fx.Graph, found: Scattered) -> list[Buffer]:
    """Buffers of zeros with all that is written to them, one write after the other."""
    chains: dict[fx.Node, list[Write]] = {}
    for node in graph.nodes:
        if name_of(node) in _WRITES and (write := found.write(node)) is not None:
            if write.base in chains:
                chains[node] = [*chains.pop(write.base), write]
            elif is_zero(write.base) or (_is_fresh(write.base) and not write.adds):
                chains[node] = [write]
    return [_buffer(writes, found) for writes in chains.values()]


def _buffer(writes: list[Write], found: Scattered) -> Buffer:
    last, spot = writes[-1].node, writes[0].spot
    for one, other in zip(writes, writes[1:]):
        if list(one.node.users) != [other.node]:
            raise refuse("slots are read between two writes", one.node, "read them when all are written")
    if any((w.spot.flat, w.spot.address.size) != (spot.flat, spot.address.size) for w in writes):
        raise refuse("addresses count different numbers of slots", last, "use one capacity")
    among = lambda routing: (routing.experts, [routing.sizes[x] for x in routing.tokens])
    if any(among(w.spot.routing) != among(spot.routing) for w in writes):
        raise refuse("choices among other experts or of other tokens", last, "choose all from one matrix")
    terms, size, experts = [w.term(found.known) for w in writes], spot.address.size, spot.routing.experts
    labels, runs = spot.labels, spot.address.runs
    if any(w.spot.address.runs != runs for w in writes):
        raise refuse("addresses count different runs", last, "let all begin where the same runs do")
    node, whole = last, as_size(size * experts)
    while len(node.users) == 1 and runs is None:
        (user,), name = node.users, name_of(next(iter(node.users)))
        if name == "slice" and argument(user, "step") == 1 and (argument(user, "start") or 0) == 0:
            dim, shape = argument(user, "dim") or 0, shape_of(user)
            if spot.flat and labels == (("e", "c"),) and dim == 0 and shape[0] == whole:
                pass
            elif len(labels) == 2 and dim == 1 and shape_of(node)[0] == experts:
                short = as_size(size - shape[1])
                size, end = shape[1], argument(user, "end")
                terms = [between(term, 0, size, short, end) for term in terms]
            else:
                break
        elif name in REGROUPS and labels == (("e", "c"),) and shape_of(user)[:-1] == [experts, size]:
            labels = (("e",), ("c",))
        else:
            break
        node = user
    counted = [experts, size] if len(labels) == 2 else [whole]
    if runs is None and shape_of(node)[: len(labels)] != counted:
        raise refuse(
            f"addresses count {size} slots for each of {experts} experts, and the buffer has other rows",
            last,
            "let it have experts * capacity rows, and cut off what stands behind them",
        )
    terms = [_but_last(term, size) for term in terms]
    shared = shared_slot(tuple(terms), set(terms[0].routing.tokens))
    if shared:
        raise refuse(
            f"nothing proves that no two rows share a slot: {shared}",
            last,
            "count places as cumsum(mask) - mask over the tokens, later choices behind all earlier ones, and "
            "write those alone whose place is below the capacity",
        )
    for write, term in zip(writes, terms):
        order = write.spot.pick.order if write.spot.pick else None
        if (
            order is not None
            and order not in found.picks.orders.stable
            and (term.guards or term.own_slot.open)
        ):
            raise refuse(
                "who is dropped depends on the order within an expert's run, and the sort promises none",
                order,
                "sort with stable=True",
            )
    return Buffer(writes, terms, node, labels, size)


def _but_last(term: Term, size: Size) -> Term:
    """Of a last slot that those share who have no other: it is nobody's, so what is in it may not be read."""
    slot = term.own_slot
    ends = [slot.off, None if slot.cut is None else slot.cut[1]]
    last = any(end is not None and as_size(end - size + 1) == 0 for end in ends)
    return between(term, 0, as_size(size - 1), 1, None) if last and not slot.guards <= term.guards else term


def reads(graph: fx.Graph, start: Buffer, found: Scattered) -> list[tuple[Read, int]]:
    """The reads of what the experts made of a buffer, each with the number of the write that it reads."""
    inside, found_reads = reached_from(graph, {start.node}), []
    routings = {term.routing for term in start.terms}
    for node in graph.nodes:
        read = found.read(node) if node in inside else None
        if read is None or read.source not in inside or read.spot.routing not in routings:
            continue
        which = [i for i, term in enumerate(start.terms) if covers(term, start.writes[i].spot, read.spot)]
        which = which if as_size(read.spot.address.size - start.size) == 0 else []
        if len(which) != 1:
            raise refuse(
                "rows are read at another address than they were written to",
                node,
                "read at the same ids, places and capacity",
            )
        found_reads.append((read, which[0]))
    if not found_reads:
        raise refuse(
            "tokens are put into slots of experts, and nothing reads them at their addresses",
            start.node,
            "read at the address: y[ids, place]",
        )
    return found_reads

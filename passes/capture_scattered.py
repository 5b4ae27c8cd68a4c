"""Tokens written into slots of experts at addresses, and read back there, become dispatch, body, combine.

    place = (cumsum(mask) - 1) at the ids                     as of a one-hot dispatch (capture_capacity.py)
    rows = zeros(E * C, H).index_add(0, ids * C + place, x)   or rows[ids, place] = x, of what is kept
    done = experts(rows.view(E, C, H))
    y = done.view(E * C, H)[ids * C + place] * weight * keep

Algorithm:
1. Of values that a mask picked (`address[keep]`) those of all assignments are made (tedfx/capture/picks.py).
2. `slot_facts` says what places, bits and addresses mean; tedfx/capture/scattered.py what a write and a read
   at an address are. Writes to one buffer are terms of one mask of slots, and proven as those of a one-hot
   dispatch are: no two rows share a slot.
3. Each assignment is dispatched by itself, [N * K, H], those that are not kept to no expert, and the body is
   walked by `SlotBodies`. `combine` gives each assignment its row, zero where it was not kept.
4. So a read may be that, if what it reads of the others is zero or meets a zero: proven for each user.
   What is read for picked assignments alone is followed to where it is put back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from tedfx.capture.by_assignment import laid_out, natural
from tedfx.capture.chains import is_zero
from tedfx.capture.choices import Choices
from tedfx.capture.indices import Numbers, index_of, rows_of
from tedfx.capture.masks import facts
from tedfx.capture.picks import Pick, Picks
from tedfx.capture.read_back import SHAPES, masked
from tedfx.capture.routing import Dims, Routing, argument, name_of, shape_of
from tedfx.capture.run_bodies import RunBodies
from tedfx.capture.scattered import Read, Scattered, Write, covers, refuse
from tedfx.capture.slot_bodies import SlotBodies
from tedfx.capture.slot_facts import slot_facts
from tedfx.capture.slot_masks import between
from tedfx.capture.slots import Bit, SlotFact, Term, shared_slot
from tedfx.capture.sorted_places import Orders
from tedfx.capture.stacks import Stacks
from tedfx.errors import CaptureError, user_line
from tedfx.graph import nodes
from tedfx.graph.emit import emit
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import REGROUPS, is_tensor, operand, reached_from
from tedfx.passes.base import Pass, PassResult
from tedfx.placement.sizes import Size, as_size
from tedfx.placement.slots import Slots
from tedfx.stages.graphs import GlobalGraph

__all__ = ["CaptureScattered"]

aten = torch.ops.aten
_WRITES = ("index_put", "index_copy", "index_add", "scatter", "scatter_add", "scatter_reduce")
_UNFILLED = ("empty", "new_empty", "empty_like")


@dataclass(frozen=True)
class CaptureScattered(Pass[GlobalGraph]):
    """See the module's docstring."""

    requires: ClassVar[frozenset[str]] = frozenset({"functional"})
    provides: ClassVar[frozenset[str]] = frozenset({"addresses captured"})

    def __call__(self, program: GlobalGraph) -> PassResult:
        graph, result = program.graph_module.graph, PassResult()
        if not any(name_of(n) in _WRITES and _is_fresh(operand(n, 0)) for n in graph.nodes):
            return result
        make = lambda target, *args, like, **kwargs: emit(graph, target, args, kwargs, like=like)
        picks = Picks(make, Orders(graph, facts(graph)))
        for node in list(graph.nodes):
            if is_tensor(node) and not VAL[node].is_floating_point():
                with graph.inserting_before(node):
                    picks.of(node)
        hits = facts(graph)
        known = slot_facts(graph, hits)
        found = Scattered(known, hits, picks)
        stacks = Stacks(program.trace, program.trainable)
        for start in _buffers(graph, found):
            reads = _reads(graph, start, found)
            _Capture(graph, start, reads, known, picks, stacks).run()
            result.matches += 1
            experts = start.writes[0].spot.routing.experts
            result.notes.append(f"{experts} experts with slots at addresses at {user_line(start.node)}")
        for node in reversed(graph.nodes):
            if node.op == "call_function" and not node.users and not node.is_impure():
                graph.erase_node(node)
        graph.eliminate_dead_code()
        stacks.finish()
        result.changes = result.matches
        return result


def _is_fresh(node: fx.Node) -> bool:
    return is_zero(node) or name_of(node) in _UNFILLED


@dataclass
class _Buffer:
    """The slots [E, C, H] or [E * C, H] at `node`, `size` each, with what was written to them."""

    writes: list[Write]
    terms: list[Term]
    node: fx.Node
    labels: Dims
    size: Size


def _buffers(graph: fx.Graph, found: Scattered) -> list[_Buffer]:
    """Buffers of zeros with all that is written to them, one write after the other."""
    chains: dict[fx.Node, list[Write]] = {}
    for node in graph.nodes:
        if name_of(node) in _WRITES and (write := found.write(node)) is not None:
            if write.base in chains:
                chains[node] = [*chains.pop(write.base), write]
            elif is_zero(write.base) or (name_of(write.base) in _UNFILLED and not write.adds):
                chains[node] = [write]
    return [_buffer(writes, found.known) for writes in chains.values()]


def _buffer(writes: list[Write], known: Mapping[fx.Node, SlotFact]) -> _Buffer:
    last, spot = writes[-1].node, writes[0].spot
    for one, other in zip(writes, writes[1:]):
        if list(one.node.users) != [other.node]:
            raise refuse("slots are read between two writes", one.node, "read them when all are written")
    if any((w.spot.flat, w.spot.address.size) != (spot.flat, spot.address.size) for w in writes):
        raise refuse("addresses count different numbers of slots", last, "use one capacity")
    among = lambda routing: (routing.experts, [routing.sizes[x] for x in routing.tokens])
    if any(among(w.spot.routing) != among(spot.routing) for w in writes):
        raise refuse("choices among other experts or of other tokens", last, "choose all from one matrix")
    terms, size, experts = [w.term(known) for w in writes], spot.address.size, spot.routing.experts
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
    over = set(terms[0].routing.tokens)
    shared = shared_slot(tuple(terms), over)
    if shared:
        raise refuse(
            f"nothing proves that no two rows share a slot: {shared}",
            last,
            "count places as cumsum(mask) - mask over the tokens, later choices behind all earlier ones, and "
            "write those alone whose place is below the capacity",
        )
    return _Buffer(writes, terms, node, labels, size)


def _reads(graph: fx.Graph, start: _Buffer, found: Scattered) -> list[tuple[Read, int]]:
    """The reads of what the experts made of a buffer, each with the number of the write that it reads."""
    inside, reads = reached_from(graph, {start.node}), []
    routings = {term.routing for term in start.terms}
    for node in graph.nodes:
        read = found.read(node) if node in inside else None
        if read is None or read.source not in inside or read.spot.routing not in routings:
            continue
        which = [
            i
            for i, term in enumerate(start.terms)
            if covers(term, start.writes[i].spot.address.runs, read.spot)
        ]
        if len(which) != 1:
            raise refuse(
                "rows are read at another address than they were written to",
                node,
                "read at the same ids, places and capacity",
            )
        reads.append((read, which[0]))
    if not reads:
        raise refuse(
            "tokens are put into slots of experts, and nothing reads them at their addresses",
            start.node,
            "read at the address: y[ids, place]",
        )
    return reads


class _Capture:
    def __init__(
        self,
        graph: fx.Graph,
        start: _Buffer,
        reads: list[tuple[Read, int]],
        known: Mapping[fx.Node, SlotFact],
        picks: Picks,
        stacks: Stacks,
    ):
        self.graph, self.start, self.reads, self.known = graph, start, reads, known
        self.picks, self.stacks = picks, stacks
        self.like = reads[0][0].node
        self.routing: Routing = start.terms[0].routing
        self.columns = [term.routing.choices for term in start.terms]

    def make(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return emit(self.graph, target, args, kwargs, like=self.like)

    def run(self) -> None:
        with self.graph.inserting_before(self.like):
            bodies, kept = self._dispatch()
            done: dict[fx.Node, fx.Node] = {}
            for read, _ in self.reads:
                if read.source not in done:
                    done[read.source] = self._combined(bodies, read, kept)
        picked: list[tuple[fx.Node, Dims]] = []
        for read, which in self.reads:
            self.like = read.node
            with self.graph.inserting_before(read.node):
                row = self._of(done[read.source], which)
                new = laid_out(row, read.spot.dims, read.spot.routing, self.make)
            needed = self._needed(read, self.start.terms[which])
            if read.spot.pick is not None:
                if not needed <= read.spot.bits:
                    raise _seen(read.node)
                self.picks.made[read.node] = replace(read.spot.pick, value=new)
                picked.append((read.node, read.spot.dims))
                continue
            wrong = masked(read.node, read.spot.dims, needed, self.known, self.picks)
            if wrong is not None:
                raise _seen(wrong)
            read.node.replace_all_uses_with(new)
        for node, dims in picked:
            _PutBack(self, node, dims).run()

    def _needed(self, read: Read, term: Term) -> frozenset[Bit]:
        """The bits of an assignment that was kept, but those without which zeros are read."""
        slot = term.own_slot
        needed = term.guards | read.spot.right
        if slot.open:
            needed |= {Bit(slot.queue, as_size(slot.size - slot.first))}
        last = as_size(self.start.size * read.spot.routing.experts)
        off = read.spot.address.off
        if read.padded and off is not None and off == last:
            needed -= read.spot.address.guards
        return needed

    def _dispatch(self) -> tuple[SlotBodies, fx.Node]:
        start, routing = self.start, self.routing
        runs = start.writes[0].spot.address.runs
        choices = Choices(self.graph, tuple(start.terms), self.like)
        each = [self._rows(write) for write in start.writes]
        rows = each[0] if len(each) == 1 else self.make(aten.cat.default, each, 1)
        x = self.make(aten.reshape.default, rows, [-1, shape_of(rows)[-1]])
        among = tuple((as_size(routing.sizes[label]), True) for label in routing.tokens)
        slots = None if runs is not None else Slots(start.size, (*among, (sum(self.columns), True)))
        dispatched, kept, tail = choices.dispatch_each(x, slots)
        sizes = {**routing.sizes, "c": start.size, "r": shape_of(start.node)[0]}
        inside = reached_from(self.graph, {start.node})
        given = (self.graph, routing, self.stacks, start.node, start.labels, sizes, inside)
        bodies = SlotBodies(*given) if runs is None else RunBodies(self.known, runs, *given)
        bodies.start(dispatched, tail)
        return bodies, kept

    def _rows(self, write: Write) -> fx.Node:
        """What was written, as [N, K, H] by assignment."""
        spot, routing = write.spot, write.spot.routing
        wrong = refuse("what is written is not a row of features per assignment", write.node, "write rows")
        pick = self.picks.of(write.rows)
        if (pick and pick.by) != (spot.pick and spot.pick.by):
            raise refuse(
                "rows are written that were not picked as their addresses were",
                write.node,
                "pick all by one mask: rows[address[keep]] = x[keep]",
            )
        rows = write.rows if pick is None else pick.value
        taken = index_of(rows)
        if taken is not None and len(taken[1]) == 1 and isinstance(taken[1][0], fx.Node):
            # Copies of tokens, by their numbers: those are no data.
            if Numbers(routing).dims(taken[1][0]) == spot.dims and len(shape_of(taken[0])) == 2:
                x = self.make(aten.unsqueeze.default, taken[0], 1)
                copies = self.make(aten.expand.default, x, [-1, routing.choices, -1])
                return copies
        return natural(rows, spot.dims, routing, self.make, wrong)

    def _combined(self, bodies: SlotBodies, read: Read, kept: fx.Node) -> fx.Node:
        """[N, K of all writes, H]: each assignment's row, zero where it was not kept."""
        value = bodies.value(read.source)
        if value.kind != "rows" or value.right != 1:
            raise refuse("what is read is not a row of features per slot", read.node, "give every slot a row")
        if bodies.labels[read.source] != read.spot.labels:
            raise refuse(
                "slots are read in another order than they were written in", read.node, "keep their order"
            )
        weights = (
            kept
            if VAL[kept].dtype == VAL[value.node].dtype
            else self.make(aten.to.dtype, kept, VAL[value.node].dtype)
        )
        out = self.make(torch.ops.tedfx.combine.default, value.node, bodies.sorted, weights)
        if VAL[out].dtype != VAL[read.source].dtype:
            out = self.make(aten.to.dtype, out, VAL[read.source].dtype)
        return self.make(aten.reshape.default, out, [-1, sum(self.columns), shape_of(out)[-1]])

    def _of(self, combined: fx.Node, which: int) -> fx.Node:
        """The columns of one write."""
        if len(self.columns) == 1:
            return combined
        first = sum(self.columns[:which])
        return self.make(aten.slice.Tensor, combined, 1, first, first + self.columns[which])


def _seen(node: fx.Node) -> CaptureError:
    return refuse(
        "what a dropped token reads is not provably left out",
        node,
        "multiply it by (place < capacity), or by weights that are zero there, or read what was kept alone",
    )


class _PutBack:
    """What is made of rows that were read for picked assignments, and where it is put back."""

    def __init__(self, capture: _Capture, read: fx.Node, dims: Dims):
        self.capture, self.read, self.dims = capture, read, dims
        self.picks, self.graph = capture.picks, capture.graph

    def run(self) -> None:
        todo, seen = [self.read], set()
        while todo:
            node = todo.pop()
            for user in list(node.users):
                if user in seen or not is_tensor(user) or name_of(user) in SHAPES:
                    continue
                seen.add(user)
                self.capture.like = user
                with self.graph.inserting_before(user):
                    made = self._placed(user, node)
                    if made is not None:
                        user.replace_all_uses_with(made)
                    elif self.picks.of(user) is not None:
                        todo.append(user)
                    else:
                        raise refuse(
                            f"rows that a mask picked are read by {user.target}",
                            user,
                            "weigh them, and add them at their tokens: out.index_add_(0, token[keep], rows)",
                        )

    def _placed(self, node: fx.Node, value: fx.Node) -> fx.Node | None:
        name, make, adds = name_of(node), self.capture.make, True
        if name == "index_put" and operand(node, 2) is value:
            indices, adds = list(nodes.argument(node, 1)), bool(argument(node, "accumulate"))
        elif name in ("index_copy", "index_add") and operand(node, 3) is value and argument(node, "dim") == 0:
            indices, adds = [operand(node, 2)], name == "index_add"
            if name == "index_add" and argument(node, "alpha") != 1:
                return None
        elif name == "scatter_add" and operand(node, 3) is value and argument(node, "dim") == 0:
            if shape_of(operand(node, 2)) != shape_of(value):
                return None
            column = rows_of(operand(node, 2))
            if column is None:
                return None
            indices = [column]
        else:
            return None
        pick, base = self.picks.of(value), operand(node, 0)
        if pick is None or any(not is_tensor(x) for x in indices):
            return None
        routing = self.reads_routing()
        if self._at_assignments(indices, pick):
            if shape_of(pick.value) != shape_of(base):
                return None
            if is_zero(base) or (pick.mask is None and not adds):
                return pick.value
            if adds:
                return make(aten.add.Tensor, base, pick.value)
            mask = make(aten.unsqueeze.default, pick.mask, -1)
            return make(aten.where.self, mask, pick.value, base)
        numbers = self.picks.of(indices[0]) if len(indices) == 1 else None
        if numbers is None or numbers.by != pick.by:
            return None
        if Numbers(routing).dims(numbers.value) != self.dims or not (adds or routing.choices == 1):
            return None
        wrong = refuse("rows that are added are no rows of features", node, "add rows of features")
        rows = make(aten.sum.dim_IntList, natural(pick.value, self.dims, routing, make, wrong), [1])
        if is_zero(base):
            return rows
        return make(aten.add.Tensor, base, rows) if adds else None

    def _at_assignments(self, indices: list, pick: Pick) -> bool:
        """Whether rows are put at their own assignments: `out[keep] = rows`, `out[order[keep]] = rows`."""
        if [VAL[x].dtype for x in indices] == [torch.bool]:
            (mask,) = indices
            return pick.order is None and mask is pick.mask
        number = self.picks.of(indices[0]) if len(indices) == len(self.dims) == 1 else None
        if number is None or number.by != pick.by:
            return False
        return name_of(number.value) == "arange" and shape_of(number.value) == shape_of(pick.value)[:1]

    def reads_routing(self) -> Routing:
        return next(r.spot.routing for r, _ in self.capture.reads if r.node is self.read)

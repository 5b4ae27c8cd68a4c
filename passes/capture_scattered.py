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
from tedfx.capture.choices import Choices
from tedfx.capture.indices import Numbers, index_of
from tedfx.capture.masks import facts
from tedfx.capture.picks import Picks
from tedfx.capture.put_back import PutBack
from tedfx.capture.read_back import masked
from tedfx.capture.routing import Routing, shape_of
from tedfx.capture.run_bodies import RunBodies
from tedfx.capture.scattered import Read, Scattered, Write, refuse
from tedfx.capture.scattered_buffers import Buffer, buffers, has_buffers, reads
from tedfx.capture.slot_addresses import unmet
from tedfx.capture.slot_bodies import SlotBodies
from tedfx.capture.slot_facts import slot_facts
from tedfx.capture.slots import Bit, SlotFact, Term
from tedfx.capture.sorted_places import Orders
from tedfx.capture.stacks import Stacks
from tedfx.errors import CaptureError, user_line
from tedfx.graph.emit import emit
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import is_tensor, reached_from
from tedfx.passes.base import Pass, PassResult
from tedfx.placement.sizes import as_size
from tedfx.placement.slots import Slots
from tedfx.stages.graphs import GlobalGraph

__all__ = ["CaptureScattered"]

aten = torch.ops.aten


@dataclass(frozen=True)
class CaptureScattered(Pass[GlobalGraph]):
    """See the module's docstring."""

    requires: ClassVar[frozenset[str]] = frozenset({"functional"})
    provides: ClassVar[frozenset[str]] = frozenset({"addresses captured"})

    def __call__(self, program: GlobalGraph) -> PassResult:
        graph, result = program.graph_module.graph, PassResult()
        if not has_buffers(graph):
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
        for start in buffers(graph, found):
            _Capture(graph, start, reads(graph, start, found), known, picks, stacks).run()
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


class _Capture:
    def __init__(
        self,
        graph: fx.Graph,
        start: Buffer,
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
        picked: list[Read] = []
        for read, which in self.reads:
            self.like = read.node
            with self.graph.inserting_before(read.node):
                row = self._of(done[read.source], which)
                wrong = refuse(
                    "tokens are grouped otherwise than where they were routed", read.node, "flatten"
                )
                new = laid_out(row, read.spot.dims, read.spot.routing, self.make, wrong)
            needed = self._needed(read, self.start.terms[which])
            if read.spot.pick is not None:
                if unmet(needed, read.spot.bits):
                    raise _seen(read.node)
                self.picks.made[read.node] = replace(read.spot.pick, value=new)
                picked.append(read)
                continue
            seen = masked(read.node, read.spot.dims, needed, self.known, self.picks)
            if seen is not None:
                raise _seen(seen)
            read.node.replace_all_uses_with(new)
        for read in picked:
            PutBack(self.graph, self.picks, read, {other.node for other in picked}).run()

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
            numbers, shape = Numbers(routing), shape_of(taken[0])
            if numbers.dims(taken[1][0]) == spot.dims and shape[:-1] == [numbers.count]:
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

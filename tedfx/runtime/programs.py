"""The programs of one ParallelModule, by kind of call: compiled at first use, made ready to run, and run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tedfx._torch import functions_recompute, inductor_options
from tedfx.errors import TedfxError
from tedfx.graph.aliases import apart, possible_aliases
from tedfx.graph.emission import emit
from tedfx.graph.signature import Path, Signature
from tedfx.ops.context import RankContext, use
from tedfx.options import Options
from tedfx.runtime.gathers import Gathered, Store
from tedfx.runtime.gradients import GradientBoundary
from tedfx.runtime.layered import interleave
from tedfx.runtime.program import Program
from tedfx.state.parameters import Placed

Compile = Callable[[Signature, dict[Path, Any], bool], Program]


@dataclass
class Ready:
    """A program that can run: how, with which gathers of parameters, and in which order it uses
    parameters."""

    program: Program
    runner: Callable[..., Sequence]
    gathers: list[Gathered]
    order: list[str]
    copied: set[int]  # operands that are read from a copy
    aliases: dict[int, tuple[int, ...]]  # outputs that may share memory with operands: tedfx/graph/aliases.py
    ran: bool = False

    def run(
        self, operands: list, grad: bool, ranks: RankContext, boundary: GradientBoundary, options: Options
    ) -> list:
        """The outputs of the graph. Under ZeRO-3 an eager one gathers what it reads as it goes."""
        read = [x.clone() if i in self.copied else x for i, x in enumerate(operands)]
        if options.compile or not self.gathers:
            with use(ranks):
                outputs = list(self.runner(*read))
            return apart(outputs, read, self.aliases)
        store = Store(
            self.gathers,
            dict(zip(self.program.parameters, read)),
            ranks,
            boundary.arrived,
            options.prefetch,
            boundary.gradient_dtype,
        )
        with use(ranks.with_store(store)), store.notes() if grad else contextlib.nullcontext():
            outputs = list(self.runner(*read))
        store.end_forward()
        return apart(outputs, read, self.aliases)


class Programs:
    """compile_program: `(signature, flat, training) -> Program`; `flat` maps paths to the leaves of this
    rank's call. known: by layout name. sum_dtype: what a compiled graph of several micro-batches sums
    gradients in.

    last: the signature that was made ready or run last.
    """

    def __init__(
        self,
        compile_program: Compile,
        known: Mapping[str, Placed],
        options: Options,
        sum_dtype: torch.dtype | None,
    ):
        self._compile_program, self._known, self._sum_dtype = compile_program, known, sum_dtype
        self.options = options
        self._ready: dict[tuple[Signature, int], Ready] = {}  # by call and number of micro-batches
        self.last: Signature | None = None

    def find(self, signature: Signature, count: int) -> Ready | None:
        """What runs `count` micro-batches of such a call, where it has been made."""
        return self._ready.get((signature, count))

    def make(self, signature: Signature, flat: dict[Path, Any], training: bool, count: int = 1) -> Ready:
        """The same, made where it is missing. Collective over the mesh."""
        if (signature, count) not in self._ready:
            program = self._program(signature, flat, training, count)
            aliases = possible_aliases(program.graph_module.graph, len(program.mutated_buffers))
            self._ready[signature, count] = Ready(
                program,
                self._runner(program),
                program.gathers(self._known),
                program.use_order(),
                program.overwritten(),
                aliases,
            )
        return self._ready[signature, count]

    def forget(self) -> None:
        """What is asked for from now on is made anew, with `options`."""
        self._ready.clear()

    def by_signature(self) -> dict[Signature, Program]:
        """In order of first use; of one call each."""
        return {signature: ready.program for (signature, count), ready in self._ready.items() if count == 1}

    def current(self) -> Program:
        """The program of the last signature."""
        if self.last is None:
            raise TedfxError("nothing is compiled yet: call the module once")
        return self._ready[self.last, 1].program

    def _program(self, signature: Signature, flat: dict[Path, Any], training: bool, count: int) -> Program:
        if count > 1:
            one = self.make(signature, flat, training).program
            return interleave(one, count, self._sum_dtype if self.options.compile else None)
        program = self._compile_program(signature, flat, training)
        unknown = [name for name in program.parameters if name not in self._known]
        if unknown:
            raise TedfxError(f"the program uses parameters without a layout: {', '.join(unknown[:5])}")
        return program

    def _runner(self, program: Program) -> Callable[..., Sequence]:
        running = emit(program.graph_module)
        if not self.options.compile:
            return running
        options = dict(self.options.compile) if isinstance(self.options.compile, Mapping) else {}
        if not options.keys() & {"mode", "options", "backend"}:
            options["options"] = inductor_options()
        # `forward`, not the module: an fx module's call reads tracebacks when it fails, which dynamo then
        # stumbles on, and the cause is lost.
        compiled = torch.compile(running.forward, fullgraph=True, **options)

        def run(*operands: Tensor) -> Sequence:
            # counts of routed rows are host integers: symbols of the compiled graph, not constants
            with torch._dynamo.config.patch(capture_scalar_outputs=True), functions_recompute():
                return compiled(*operands)

        return run

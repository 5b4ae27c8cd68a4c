"""The pass protocol and the runner."""

import dataclasses
from typing import ClassVar

import pytest
from torch import fx

from tedfx.compiler import compile_graph
from tedfx.errors import ContractError
from tedfx.passes.base import Pass, PassResult, check_contracts, run_pipeline
from tedfx.placement.plan import Plan
from tedfx.stages.graphs import GlobalGraph, PlannedGraph
from tests.graphs import global_graph


def program():
    graph = fx.Graph()
    graph.output((graph.placeholder("x"),))
    return global_graph(graph)


def seen(program) -> list:
    """What steps wrote down: the notes of the trace."""
    return program.trace.notes


@dataclasses.dataclass(frozen=True)
class Step(Pass):
    """Writes its option down."""

    option: int = 1
    provides: ClassVar[frozenset[str]] = frozenset({"stepped"})

    def __call__(self, program):
        seen(program).append(self.option)
        return PassResult(matches=1, changes=2, notes=["walked"])


@dataclasses.dataclass(frozen=True)
class AfterStep(Pass):
    requires: ClassVar[frozenset[str]] = frozenset({"stepped"})

    def __call__(self, program):
        return PassResult()


@dataclasses.dataclass(frozen=True)
class Breaks(Pass):
    def __call__(self, program):
        graph = program.graph_module.graph
        x = next(iter(graph.nodes))
        with graph.inserting_after(x):
            late = graph.call_function(abs, (x,))
        with graph.inserting_before(x):
            graph.call_function(abs, (late,))
        return PassResult()


def test_a_pass_prints_its_name_and_options():
    assert str(Step(option=3)) == "step{option=3}"
    assert str(AfterStep()) == "after_step"


def test_a_pass_is_frozen_and_compares_by_its_options():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Step().option = 2
    assert Step(2) == Step(2) != Step(3)


def test_the_runner_records_every_pass():
    p = program()
    assert run_pipeline(p, [Step(1), Step(2), AfterStep()]) is p
    assert seen(p) == [1, 2]
    history = p.history
    assert [r.name for r in history] == ["step", "step", "after_step"]
    assert history[0].result.notes == ["walked"] and history[0].seconds >= 0
    assert str(history[0]).startswith("step{option=1}: 1 matched, 2 changed")


def test_contracts_are_checked_before_anything_runs():
    p = program()
    with pytest.raises(
        ContractError, match="after_step requires 'stepped': step provides it, but runs later"
    ):
        run_pipeline(p, [AfterStep(), Step()])
    with pytest.raises(ContractError, match="no pass provides it"):
        check_contracts([AfterStep()])
    assert seen(p) == []
    check_contracts([AfterStep()], have={"stepped"})


@dataclasses.dataclass(frozen=True)
class Plans(Pass[GlobalGraph]):
    gives = PlannedGraph

    def __call__(self, program):
        return PassResult(changes=1, next=program.then(PlannedGraph, plan=Plan(program.roles)))


@dataclasses.dataclass(frozen=True)
class OnThePlan(Pass[PlannedGraph]):
    requires: ClassVar[frozenset[str]] = frozenset({"planned"})

    def __call__(self, program):
        program.plan.sequence = ("tp",)
        return PassResult()


@dataclasses.dataclass(frozen=True)
class Forgets(Pass[GlobalGraph]):
    gives = PlannedGraph

    def __call__(self, program):
        return PassResult()


def test_a_pass_may_make_the_next_stage():
    p = program()
    planned = run_pipeline(p, [Step(), Plans(), OnThePlan(), Step()])
    assert isinstance(planned, PlannedGraph) and planned.plan.sequence == ("tp",)
    assert planned.graph_module is p.graph_module and planned.setting is p.setting
    assert [r.name for r in planned.history] == ["step", "plans", "on_the_plan", "step"]
    with pytest.raises(ContractError, match="forgets gives a planned graph, and its result has none"):
        run_pipeline(program(), [Forgets()])


def test_the_order_of_stages_is_checked_before_anything_runs():
    p = program()
    for passes, line in (
        (
            [Step(), OnThePlan(), Plans()],
            "on_the_plan works on a planned graph, .* a global one: put it behind plans",
        ),
        ([Step(), OnThePlan()], "on_the_plan works on a planned graph, .* no pass gives one"),
        ([Step(), Plans(), Plans()], "plans works on a global graph, .* a planned one: put it before plans"),
    ):
        with pytest.raises(ContractError, match=line):
            run_pipeline(p, passes)
    assert seen(p) == []
    assert check_contracts([Plans(), OnThePlan()]) is PlannedGraph
    with pytest.raises(ContractError, match="end with a planned graph, and a rank runs a local one"):
        compile_graph(p, [Plans()])


def test_an_invalid_graph_is_found_where_it_is_made():
    with pytest.raises(RuntimeError, match="used before"):
        run_pipeline(program(), [Breaks()])


def test_the_verifier_runs_after_every_pass():
    verified = []
    run_pipeline(program(), [Step(), AfterStep()], verify=lambda prog, p: verified.append(p.name))
    assert verified == ["step", "after_step"]


@pytest.mark.parametrize("setting, shown", [("all", True), ("step", True), ("other", False), ("", False)])
def test_printing(monkeypatch, capsys, setting, shown):
    monkeypatch.setenv("TEDFX_PRINT_AFTER", setting)
    run_pipeline(program(), [Step()])
    err = capsys.readouterr().err
    assert ("before step{option=1}" in err and "after step{option=1}" in err) == shown

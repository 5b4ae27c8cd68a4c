"""The pass protocol and the runner, in pure python: the program is a stand-in."""

import dataclasses
import types
from typing import ClassVar

import pytest
from tedfx.passes.base import Pass, PassResult, check_contracts, run_pipeline
from torch import fx

from tedfx.errors import ContractError


def program():
    graph = fx.Graph()
    graph.output((graph.placeholder("x"),))
    return types.SimpleNamespace(graph_module=fx.GraphModule({}, graph), seen=[])


@dataclasses.dataclass(frozen=True)
class Step(Pass):
    """Writes its option down."""

    option: int = 1
    provides: ClassVar[frozenset[str]] = frozenset({"stepped"})

    def __call__(self, program):
        program.seen.append(self.option)
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
    p, history = program(), []
    assert run_pipeline(p, [Step(1), Step(2), AfterStep()], history) is history
    assert p.seen == [1, 2]
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
    assert p.seen == []
    check_contracts([AfterStep()], have={"stepped"})


def test_an_invalid_graph_is_found_where_it_is_made():
    with pytest.raises(RuntimeError, match="used before"):
        run_pipeline(program(), [Breaks()])


def test_the_verifier_runs_after_every_pass():
    seen = []
    run_pipeline(program(), [Step(), AfterStep()], verify=lambda prog, p: seen.append(p.name))
    assert seen == ["step", "after_step"]


@pytest.mark.parametrize("setting, shown", [("all", True), ("step", True), ("other", False), ("", False)])
def test_printing(monkeypatch, capsys, setting, shown):
    monkeypatch.setenv("TEDFX_PRINT_AFTER", setting)
    run_pipeline(program(), [Step()])
    err = capsys.readouterr().err
    assert ("before step{option=1}" in err and "after step{option=1}" in err) == shown

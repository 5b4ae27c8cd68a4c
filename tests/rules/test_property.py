"""Every rule: run the op on shards, compare with the op on the whole, forward and backward.

For each case of `tests/rules/cases/`, every placement of the operands (R, I, P and S of each factor) is put
to `decide`; each decision it comes to is run on two ranks in float64 and joined by type. The graph of a rank
is made by `Localize`, so local sizes, parallel vocabulary forms and global counts are under test as well. On
three ranks factors are cut that they do not divide: 4 into 2, 2 and 0.
"""

from types import SimpleNamespace

import pytest
import torch

from tedfx.graph.nodes import op_name
from tedfx.rules import RULES, complexes, rule_for
from tests.rules.cases import CASES
from tests.rules.one_op import build, compare, decisions, words

# Cases whose rule is wrong today (reported); each must start to pass when its rule is mended.
WRONG: dict[str, str] = {}


def _param(case):
    return pytest.param(
        case,
        id=case.name,
        marks=pytest.mark.xfail(strict=True, reason=WRONG[case.name]) if case.name in WRONG else (),
    )


@pytest.mark.parametrize("case", [_param(c) for c in CASES])
def test_shards_of_the_op_make_the_whole(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [_param(c) for c in CASES])
def test_unequal_and_empty_shards_of_the_op_make_the_whole(case):
    check(case, 3)


def check(case, degree=2):
    generator = torch.Generator().manual_seed(1)
    reached, done = set(), []
    for trainable in ("all", "first"):
        program = build(case, trainable, degree)
        learned = tuple(sorted(program.trainable))
        if learned in done:
            continue
        done.append(learned)
        for final, outs, planned in decisions(program):
            program.plan.factors = {"tp": planned}
            reached.add(words(program, final, outs))
            compare(program, final, outs, generator)
    missing = [w for w in case.reaches if w not in reached and degree == 2]
    assert not missing, f"never {missing}; reached {sorted(reached)}"


def _named(name):
    return next(c for c in CASES if c.name == name)


def _nothing_whole(relation):
    relation.whole = {}


def _nothing_contracted(relation):
    relation.contracted = ()


def _linear_in_all(relation):
    relation.linear = (frozenset({0}), frozenset({1}), frozenset({0, 1}))


@pytest.mark.parametrize(
    "name, spoil",
    [
        ("softmax", _nothing_whole),
        ("topk", _nothing_whole),
        ("layer_norm", _nothing_whole),
        ("cumprod", _nothing_whole),
        ("gather", _nothing_whole),
        ("sdpa", _nothing_whole),
        ("linear", _nothing_contracted),
        ("sum dim", _nothing_contracted),
        ("matmul", _linear_in_all),
        ("relu", _linear_in_all),
        ("div", _linear_in_all),
        ("mul square", _linear_in_all),
        ("where one", _linear_in_all),
        ("index rows", _nothing_whole),
        ("chunk", _nothing_whole),
        ("flip", _nothing_whole),
        ("histc free", _nothing_whole),
        ("multinomial", _nothing_whole),
    ],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_a_spoilt_rule_is_seen(name, spoil, monkeypatch):
    """The check itself: each of these mistakes in a rule must show."""
    case = _named(name)
    right = rule_for(SimpleNamespace(target=case.target))

    def wrong(node, ctx):
        relation = right(node, ctx)
        spoil(relation)
        return relation

    monkeypatch.setitem(RULES, op_name(SimpleNamespace(target=case.target)), wrong)
    with pytest.raises(Exception):
        check(case)


def test_every_rule_has_a_case():
    name = lambda case: op_name(SimpleNamespace(target=case.target))

    without = {
        "getitem",
        "aten._reshape_copy",
        "aten.concat",
        "aten.concatenate",
        "aten.empty",
        "aten.new_empty",
        "aten.empty_like",
    }
    without |= {"tedfx.dispatch"}  # tests/passes/test_lower_experts.py
    without |= {
        "group_cumsum",
        "group_total",
    }  # not the single device's function on shards: tests/parity/test_capacity.py
    tried = {name(c) for c in CASES}
    parts = {
        rule for rule in RULES if RULES[rule].__module__ == complexes.__name__
    }  # one of each function of that file
    without |= {
        rule for rule in parts - tried if RULES[rule] in {RULES[each] for each in tried if each in RULES}
    }
    assert set(RULES) - tried == without

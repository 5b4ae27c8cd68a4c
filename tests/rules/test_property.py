"""Every rule: run the op on shards, compare with the op on the whole, forward and backward.

For each case of `tests/rules/cases.py`, every placement of the operands (R, I, P and S of each factor) is put to `decide`; each decision it comes to
is run on two ranks in float64 and joined by type. The graph of a rank is made by `Localize`, so local sizes, parallel vocabulary forms and global
counts are under test as well.
"""

import pytest
import torch

from tedfx.rules import RULES, op_name
from tests.rules.cases import CASES
from tests.rules.one_op import build, compare, decisions, words

# Cases whose rule is wrong today (reported); each must start to pass when its rule is mended.
WRONG: dict[str, str] = {
    "var default": "unbiased=False is taken for dim 0",
    "embedding by frequency": "frequencies are counted per shard",
    "sdpa gqa flag, equal heads": "TraceError although nothing is grouped",
    "to other": "the dims of the operand that only gives a dtype are matched",
    "isin": "the test elements' dims are matched with the elements'",
    "isin equal sizes": "each rank looks at its own test elements only: silently wrong",
    "view_as": "AssertionError where the shape's giver is sharded",
    "expand_as": "dims that are not widened are not matched: silently wrong",
    "repeat_interleave flat": "TypeError without a dim",
    "tile": "fewer counts than dims",
    "roll flat": "TypeError without dims",
    "take_along_dim broadcast": "the index's dim of size 1 is broadcast",
    "take_along_dim flat": "TypeError without a dim",
    "eye": "created sharded, made whole",
    "linspace": "created sharded, made whole",
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.xfail(strict=True, reason=WRONG[c.name]) if c.name in WRONG else ()) for c in CASES], ids=lambda c: c.name)
def test_shards_of_the_op_make_the_whole(case):
    generator = torch.Generator().manual_seed(1)
    reached, floats = set(), None
    for trainable in ("all", "first", "none"):
        program = build(case, trainable)
        learned = tuple(sorted(program.trainable))
        floats = floats or []
        if learned in floats:
            continue
        floats.append(learned)
        for final, outs, planned in decisions(program):
            program.plan.factors = {"tp": planned}
            reached.add(words(program, final, outs))
            compare(program, final, outs, generator)
    missing = [w for w in case.reaches if w not in reached]
    assert not missing, f"never {missing}; reached {sorted(reached)}"


def test_every_rule_has_a_case():
    def name(case):
        from types import SimpleNamespace

        return op_name(SimpleNamespace(target=case.target))

    without = {"getitem", "aten._reshape_copy", "aten.concat", "aten.concatenate", "aten.empty", "aten.new_empty", "aten.empty_like", "aten.rand_like", "aten.randn_like"}
    without |= {"tedfx.dispatch"}  # tests/rules/test_experts.py
    assert set(RULES) - {name(c) for c in CASES} == without

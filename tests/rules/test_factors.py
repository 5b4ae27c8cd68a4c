"""Factors: unification, refinement, regrouping, and the cases in which they must change nothing."""

import sympy

from tedfx.placement.factors import Factor, dim_size, leaves, refine_dim, regroup, unify
from tedfx.placement.sizes import as_size, at_least_zero, holds
from tedfx.placement.types import I, P, R, Shard, find_dim, format_type, sharding_axes

s = sympy.Symbol("s", positive=True, integer=True)
b = sympy.Symbol("b", positive=True, integer=True)


def dim(*sizes):
    return tuple(Factor(size) for size in sizes)


def test_conditions_on_sizes():
    divided = sympy.Ne(sympy.Mod(3, 3 * ((2 * s) // 3)), 0)
    assert holds(divided, {s: 1}) is False  # by zero
    assert holds(sympy.Ge(s, b), {s: 2, b: 1}) is True and holds(sympy.Ge(s, b), {s: 2}) is None
    assert at_least_zero(s - 1) and at_least_zero(7) and not at_least_zero(90 - s) and not at_least_zero(-1)


def sizes(d):
    return [f.size for f in leaves(d)]


def test_unify_merges_equal_dims():
    x, y = dim(4), dim(4)
    assert unify(x, y) and leaves(x) == leaves(y) and leaves(x)[0] is x[0]  # the older factor stays


def test_unify_is_transitive_and_keeps_a_name():
    x, y, z = dim(4), (Factor(4, "heads"),), dim(4)
    assert unify(x, y) and unify(y, z)
    assert {leaves(d)[0].name for d in (x, y, z)} == {"heads"} and len({leaves(d) for d in (x, y, z)}) == 1


def test_unify_refines_the_coarser_side_wherever_it_stands():
    coarse, fine, elsewhere = dim(12), dim(2, 6), dim(12)
    unify(coarse, elsewhere)
    assert unify(coarse, fine)
    assert sizes(coarse) == sizes(elsewhere) == [2, 6] and leaves(elsewhere) == leaves(fine)


def test_unify_refines_both_sides():
    x, y = dim(4, 3, 2), dim(2, 2, 6)
    assert unify(x, y)
    assert sizes(x) == [2, 2, 3, 2] and leaves(x) == leaves(y)


def test_factorisations_that_do_not_agree_change_nothing():
    for left, right in ([(3, 4), (4, 3)], [(6, 4), (4, 6)], [(4,), (6,)], [(4,), (4, 2)], [(2, s), (s, 2)]):
        x, y = dim(*left), dim(*right)
        assert not unify(x, y)
        assert sizes(x) == list(left) and sizes(y) == list(right)


def test_a_factor_met_under_two_splits_is_not_refined():
    f = Factor(4)
    assert not unify((f, f), dim(2, 2, 4))
    assert sizes((f,)) == [4]


def test_a_vetoed_refinement_changes_nothing():
    x, y = dim(4, 3), dim(2, 2, 3)
    asked = []
    assert not unify(x, y, lambda factor, parts: asked.append((factor, parts)))
    assert sizes(x) == [4, 3] and asked == [(x[0], [2, 2])]
    assert unify(x, y, lambda factor, parts: True)


def test_symbols_unify_with_themselves_only():
    assert unify(dim(s), dim(s)) and not unify(dim(s), dim(b)) and not unify(dim(s), dim(4))
    x, y = dim(s, 8), dim(s, 2, 4)
    assert unify(x, y) and sizes(x) == [s, 2, 4]
    x, y = dim(2 * s), dim(s, 2)
    assert unify(x, y) and sizes(x) == [s, 2] and not unify(dim(2 * s), dim(2, s))


def test_regroup_merges_and_splits_in_order():
    x = [dim(4), dim(6), dim(8)]
    (merged, last) = regroup(x, [24, 8])
    assert merged == x[0] + x[1] and last == x[2]
    first, second, third = regroup([merged], [4, 2, 3])
    assert first == leaves(x[0]) and sizes(x[1]) == [2, 3] and leaves(x[1]) == second + third


def test_regroup_with_symbols():
    x = [dim(b), dim(s), dim(8)]
    assert [sizes(d) for d in regroup(x, [b * s, 8])] == [[b, s], [8]]
    assert [sizes(d) for d in regroup([(*x[0], *x[1]), x[2]], [b, s, 2, 4])] == [[b], [s], [2], [4]]
    pairs = dim(b * 4)
    assert regroup([dim(b * 4)], [4, b]) is None  # the quarters: a shard of the whole is none of either part
    assert [sizes(d) for d in regroup([pairs], [2 * b, 2])] == [[2 * b], [2]] and sizes(pairs) == [2 * b, 2]
    assert regroup([dim(b), dim(4)], [4, b]) is None


def test_regroup_of_ones_and_of_what_does_not_fit():
    x = [dim(4), (), dim(6)]
    assert regroup(x, [1, 4, 1, 6, 1]) == [(), x[0], (), x[2], ()]
    assert regroup([dim(3), dim(4)], [4, 3]) is None
    assert regroup([dim(4)], [2]) is None and regroup([dim(4)], [4, 2]) is None


def test_regroup_of_a_factor_that_stands_twice():
    f = Factor(4)
    assert [sizes(d) for d in regroup([(f,), (f,)], [2, 8])] == [[2], [2, 2, 2]]


def test_refine_dim():
    x = dim(12)
    assert [sizes(d) for d in refine_dim(x, [2, 6])] == [[2], [6]] and sizes(x) == [2, 6]
    assert refine_dim(dim(3, 4), [2, 6]) is None


def test_sizes():
    assert (
        dim_size(()) == 1
        and dim_size(dim(2, 3)) == 6
        and dim_size(dim(s, 2)) == 2 * s
        and as_size(sympy.Integer(3)) == 3
    )


def test_types():
    heads, width, rows = Factor(4, "heads"), Factor(8), Factor(6, "rows", ragged=True)
    type_ = {"dp": Shard(heads), "tp": Shard(heads), "ep": P, "cp": I}
    assert sharding_axes(type_, heads) == ("dp", "tp")
    dims = [(width, heads), (width,)]
    assert find_dim(dims, heads) == (0, 1) and find_dim(dims, rows) is None
    assert (
        format_type(type_, dims) == "dp:S(0.1) tp:S(0.1) ep:P"
        and format_type({"dp": I}) == "I"
        and format_type({"ep": Shard(rows)}, [(rows,)]) == "ep:V"
    )
    other = Factor(4)
    assert Shard(heads) != Shard(other)
    heads.merge(other)
    assert (
        Shard(heads) == Shard(other)
        and hash(Shard(heads)) == hash(Shard(other))
        and [str(p) for p in (R, I, P)] == ["R", "I", "P"]
        and len({R, I, P}) == 3
    )

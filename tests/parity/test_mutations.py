"""A change that breaks a gradient's scale, a group or an adjoint turns verification red. Each mutation is
made in the ranks alone, those of one case one after another, between two runs without any."""

import functools

import pytest

from tests.parity import mutations
from tests.parity.cases import case, verified_each

ONE = {"num_hidden_layers": 1}
TP = case("llama", "tp=2", steps=1, overrides=ONE, sequence_parallel=False)
CUT = case("llama", "tp=2", steps=1, overrides=ONE)
DP = case("mixtral", "dp=2", steps=1, overrides=ONE)
EP = case("mixtral", "ep=2", steps=1, overrides=ONE)
EP_TP = case("mixtral", "ep=2,tp=2", steps=1, overrides=ONE)
DP_TP = case("llama", "dp=2,tp=2", steps=1, overrides=ONE)
ZERO = case("mixtral", "dp=2", steps=1, overrides=ONE, zero=3)
DP_EP = case("mixtral", "dp=2,ep=2", steps=1, overrides=ONE)

# mutation -> (case, rows that must fail)
MUTATIONS = [
    (mutations.all_reduce_adjoint_sums, TP, ("gradients",)),
    (mutations.sum_gradient_forgets, TP, ("gradients",)),
    (mutations.sum_gradient_averages, TP, ("gradients",)),
    (mutations.boundary_averages, DP, ("gradients", "gradient norm")),
    (mutations.boundary_skips, DP, ("gradients", "replicas")),
    (mutations.boundary_skips_experts, DP_EP, ("gradients", "replicas")),
    (mutations.shares_in_another_order, ZERO, ("loss", "gradients")),
    (mutations.weights_read_back_to_front, ZERO, ("gradients",)),
    (mutations.groups_swapped, DP_TP, ("loss", "gradients")),
    (mutations.label_count_is_local, DP, ("loss", "gradients")),
    (mutations.exchange_forgets_a_row, EP, ("gradients",)),
    (mutations.unsorted_adjoint, EP, ("gradients",)),
    (mutations.router_gets_no_gradient, EP, ("gradients",)),
    (mutations.cross_entropy_local_softmax, TP, ("gradients",)),
    (mutations.gather_keeps_its_own_gradient, CUT, ("gradients",)),
    (mutations.lanes_keep_their_own_gradient, EP_TP, ("gradients",)),
]


@functools.cache
def results(on):
    """By mutation; its name is a function's."""
    made = [mutation for mutation, case, _ in MUTATIONS if case == on]
    made += [mutations.last_bit_on_one_rank] * (on == TP)
    control, *found, again = verified_each(on, [mutations.nothing, *made, mutations.nothing])
    assert control.ok and again.ok, f"without a mutation:\n{control}\n{again}"
    return {mutation.__name__: result for mutation, result in zip(made, found, strict=True)}


@pytest.mark.parametrize("mutation, on, red", MUTATIONS, ids=[m.__name__ for m, *_ in MUTATIONS])
def test_turns_verification_red(mutation, on, red):
    result = results(on)[mutation.__name__]
    assert not result.ok
    for quantity in red:
        assert not result[quantity].ok, f"{quantity} is still within its tolerance\n{result}"


def test_a_last_bit_is_seen_by_the_replicas_alone():
    result = results(TP)["last_bit_on_one_rank"]
    assert not result["replicas"].ok
    assert all(row.ok for row in result.rows if not row.quantity.startswith("replicas"))

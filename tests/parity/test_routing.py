"""Uneven work: experts without tokens, ranks without rows, ranks whose tokens all go to one expert, ranks
without a valid label."""

import dataclasses

import pytest
import torch

from tests.parity.cases import case, on_single, verified

EP, EP_TP, ALL = (case("mixtral", mesh) for mesh in ("ep=2", "ep=2,tp=2", "dp=2,ep=2,tp=2"))
PPMOE = case("mixtral", "tp=2", roles={"expert": "tp"})
FOLDED = case("mixtral", "ep=2,tp=2", roles={"expert": ("ep", "tp")})
SWITCH = case("plain_switch", "ep=2")


def counts_by_half(model, batch):
    """Per experts module: assignments per expert of the first and of the second half of the rows."""
    found = []

    def note(module, args):
        halves = args[1].reshape(2, -1)
        found.append([torch.bincount(half, minlength=module.num_experts).tolist() for half in halves])

    for module in model.modules():
        if hasattr(module, "num_experts") and hasattr(module, "down_proj"):
            module.register_forward_pre_hook(note)
    model(**batch)
    return found


def test_the_batches_are_what_their_names_say():
    first, second = on_single(dataclasses.replace(EP, batch="one_token"), counts_by_half)[0]
    assert first == second and first.count(0) == 2
    assert first[:2] == [0, 0] or first[2:] == [0, 0], "one of two expert ranks shall have no rows at all"
    first, second = on_single(dataclasses.replace(EP, batch="one_token_in_second_half"), counts_by_half)[0]
    assert 0 not in first and second.count(0) == 2


@pytest.mark.parametrize("mesh", [EP, EP_TP, PPMOE, FOLDED], ids=str)
def test_experts_and_ranks_without_tokens(mesh):
    result = verified(dataclasses.replace(mesh, batch="one_token"))
    assert result.ok, f"\n{result}"


@pytest.mark.parametrize("mesh", [EP, ALL, SWITCH], ids=str)
def test_a_rank_whose_tokens_all_go_to_the_same_experts(mesh):
    result = verified(dataclasses.replace(mesh, batch="one_token_in_second_half"))
    assert result.ok, f"\n{result}"


@pytest.mark.parametrize("mesh", [EP, ALL], ids=str)
def test_ranks_without_a_valid_label(mesh):
    result = verified(dataclasses.replace(mesh, batch="no_labels_in_second_half"))
    assert result.ok, f"\n{result}"

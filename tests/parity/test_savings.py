"""The savings, each alone and together, against the single device. The default set runs in every other test
of this folder."""

import pytest

from tests.parity.cases import case, on_ranks, verified
from tests.parity.test_training import with_dropout, worst

DEDUP = dict(sequence_parallel=False)
NEITHER = dict(dedup=False, sequence_parallel=False)
PLAIN = dict(sequence_parallel=False, algebra=False)
FOLDED = {"expert": ("ep", "tp")}


@pytest.mark.parametrize(
    "this",
    [
        case("mixtral", "ep=2,tp=2", **DEDUP),
        case("deepseek_v3", "dp=2,ep=2,tp=2", **DEDUP),
        case("gpt_oss", "ep=2,tp=2", roles=FOLDED, **DEDUP),
        case("plain_normed", "tp=2,ep=2", **DEDUP),
        case("mixtral", "ep=2,tp=2", roles={"expert_tensor": ()}, **DEDUP),
        case("mixtral", "ep=2,tp=2", roles=FOLDED, **NEITHER),
        case("deepseek_v3", "ep=2,tp=2", **NEITHER),
        case("gpt_oss", "tp=2", roles={"expert": "tp"}, **NEITHER),
        case("mixtral", "ep=2,tp=2", roles={"expert_tensor": ()}),
        case("mixtral", "ep=2,tp=2", **PLAIN),
        case("deepseek_v3", "dp=2,ep=2,tp=2", checkpoint="comm", **PLAIN),
        case("gpt_oss", "tp=2,ep=2", dedup=False, **PLAIN),
        case("plain_normed", "ep=2,tp=2", roles=FOLDED, **PLAIN),
        case("qwen3_moe", "ep=2,tp=2", algebra=False),
        case("capacity_gshard", "ep=2,tp=2", **PLAIN),
        case("capacity_gshard", "ep=2,tp=2", capacity="local", **PLAIN),
    ],
    ids=str,
)
def test_switches(this):
    result = verified(this)
    assert result.ok, f"\n{result}"


@pytest.mark.parametrize(
    "this",
    [
        case("mixtral", "ep=2,tp=2", batch="odd"),
        case("deepseek_v3", "tp=2", batch="odd"),
        case("qwen3_moe", "ep=2,tp=2", batch="odd", **DEDUP),
        case("llama", "tp=4", batch="shorter_than_ranks"),
        case("mixtral", "tp=4", roles={"expert": "tp"}, batch="shorter_than_ranks"),
        case("mixtral", "ep=2,tp=2", batch="one_token", **DEDUP),
        case("mixtral", "ep=2,tp=2", batch="odd", **PLAIN),
        case("mixtral", "ep=2,tp=2", batch="one_token", **PLAIN),
    ],
    ids=str,
)
def test_tokens_that_the_ranks_do_not_divide(this):
    result = verified(this)
    assert result.ok, f"\n{result}"


def test_dropout_draws_do_not_depend_on_how_tokens_are_cut():
    this = case("mixtral", "ep=2,tp=2", overrides={"attention_dropout": 0.3}, batch="odd", **NEITHER)
    loss, grads, *_ = on_ranks(this, with_dropout)[0]
    other, other_grads, *_ = on_ranks(this.asking(dedup=None, sequence_parallel=None), with_dropout)[0]
    assert abs(other - loss) < 1e-6 * abs(loss) and worst(other_grads, grads)[1] < 1e-5

"""What the axes do not divide: experts, vocabulary, feed-forward widths and heads in pieces that are not
equal, and on some ranks empty."""

import pytest

from tests.marks import slow
from tests.parity.cases import case, on_ranks, verified

PPMOE, FOLDED = {"expert": "tp"}, {"expert": ("ep", "tp")}
THREE = {"experts": 3, "layers": 1}
ODD = dict(num_attention_heads=3, num_key_value_heads=1, hidden_size=24, vocab_size=63, intermediate_size=33)
ODD |= dict(num_hidden_layers=1)
PLAIN = dict(heads=3, hidden_size=24, vocab_size=63, inner_size=33, layers=1)
# Over three ranks: heads 2, 2, 1; vocabulary 22, 22, 20; of the experts' hidden dim 2, 2, 0.
THIRDS = dict(heads=5, hidden_size=40, vocab_size=64, inner_size=4, layers=1)
CASES = [
    case("plain", "tp=2", overrides=PLAIN, steps=2),
    case("plain", "ep=2,tp=2", overrides=THREE, steps=2, batch="one_token_in_second_half"),
    slow(
        case("plain", "ep=4", overrides={"experts": 6}, steps=2)
    ),  # two on each of three ranks, none on the last
    slow(case("plain_stacked", "ep=2,tp=2", roles=FOLDED, overrides={"experts": 5}, steps=2)),
    slow(case("plain_stacked", "tp=2", roles=PPMOE, overrides=THREE, steps=2, checkpoint="comm")),
    slow(case("plain", "dp=2,ep=2", overrides=THREE, steps=2, batch="odd", zero=3)),
    slow(case("plain", "dp=2,ep=2", overrides=THREE, steps=2, batch="odd", zero=1)),
    slow(case("plain", "dp=2,ep=2", overrides=THREE, steps=1, zero=3, compile="aot_eager")),
    slow(case("plain", "ep=2,tp=2", overrides=THREE, steps=1, compile="aot_eager")),
    slow(case("plain_normed", "ep=2,tp=2", overrides=THREE, steps=2, algebra=False)),
    slow(case("plain", "ep=2", overrides=THREE | {"expert": "gelu", "dropout": 0.2}, steps=2)),
    slow(case("plain_stacked", "ep=2,tp=2", overrides=THREE, steps=2, sharded=None)),
    slow(case("capacity_switch", "dp=2,ep=2", overrides=THREE, steps=2)),
    slow(case("capacity_switch", "dp=2,ep=2", overrides=THREE, steps=2, capacity="local")),
    slow(case("qwen3_moe", "ep=2,tp=2", overrides={"num_experts": 5}, steps=2)),
    slow(case("mixtral", "ep=2,tp=2", overrides=ODD | {"num_local_experts": 3}, steps=2)),
    slow(case("llama", "dp=2,tp=2", overrides=ODD, steps=2, batch="odd")),
    slow(case("llama", "tp=2", overrides=ODD, steps=2, sharded=None)),
    slow(case("plain", "tp=2", overrides=PLAIN, steps=2, sequence_parallel=False, sharded=None)),
    slow(case("plain", "tp=2", overrides=PLAIN | {"dropout": 0.2, "expert": "gelu"}, steps=2)),
    slow(case("plain_normed", "tp=2", overrides=PLAIN, steps=2, algebra=False)),
    slow(case("plain", "ep=2,tp=2", overrides=PLAIN | {"experts": 3}, steps=2, batch="odd")),
    slow(case("plain", "ep=2,tp=2", overrides=PLAIN, steps=2, sequence_parallel=False, dedup=False)),
    slow(case("plain", "dp=2,tp=2", overrides=PLAIN, steps=2, zero=1)),
    slow(case("plain", "dp=2,tp=2", overrides=PLAIN, steps=2, zero=2)),
    slow(case("plain", "dp=2,tp=2", overrides=PLAIN, steps=2, zero=3)),
    slow(case("plain", "dp=2,tp=2", overrides=PLAIN, steps=2, zero=3, sharded=None)),
    slow(case("plain", "dp=2,tp=2", overrides=PLAIN | {"experts": 3}, roles=PPMOE, steps=2, zero=1)),
    slow(case("plain", "tp=2", overrides=PLAIN, steps=1, compile="aot_eager")),
    slow(case("plain", "dp=2,tp=2", overrides=PLAIN, steps=1, zero=3, compile="aot_eager")),
    slow(case("plain", "tp=3", overrides=THIRDS, steps=2)),
    slow(case("plain", "tp=3", overrides=THIRDS, steps=2, sequence_parallel=False, checkpoint="full")),
    slow(case("plain", "tp=3", overrides=THIRDS, steps=1, compile="aot_eager")),
    slow(case("plain", "dp=2,tp=3", overrides=THIRDS, steps=2, zero=1)),
    slow(case("plain", "dp=2,tp=3", overrides=THIRDS, steps=2, zero=3)),
    slow(case("plain", "dp=2,tp=3", overrides=THIRDS | {"vocab_size": 4}, steps=2, sharded=None)),
    slow(case("plain_stacked", "tp=3", overrides=THIRDS, steps=2)),
    slow(case("plain", "dp=2,ep=4", overrides={"experts": 3, "layers": 1}, steps=2, zero=1)),
    slow(case("plain", "dp=2,ep=4", overrides={"experts": 3, "layers": 1}, steps=2, zero=2)),
    slow(case("plain", "dp=2,ep=4", overrides={"experts": 3, "layers": 1}, steps=2, zero=3)),
    slow(case("plain", "ep=4", overrides={"experts": 3, "layers": 1}, steps=1, compile="aot_eager")),
    slow(
        case(
            "mixtral",
            "tp=3",
            overrides=dict(num_attention_heads=8, num_key_value_heads=8, vocab_size=65),
            steps=2,
        )
    ),
    slow(case("deepseek_v3", "tp=3", overrides=dict(vocab_size=65), steps=2)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_single_device(case):
    result = verified(case)
    assert result.ok, f"\n{result}"


def held(pm, batch, rank):
    return {name: tuple(p.to_local().shape) for name, p in pm.named_parameters() if "experts" in name}


def test_ranks_hold_their_own_experts_only():
    first, second = on_ranks(case("plain", "ep=2", overrides=THREE), held)
    assert first and {shape[0] for shape in first.values()} == {2}
    assert {shape[0] for shape in second.values()} == {1}

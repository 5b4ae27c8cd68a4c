"""Not by replicating: what is whole on a mesh, and how often the ranks talk."""

import pytest

from tedfx.ops import count_collectives
from tedfx.verification.batches import split_batch
from tests.marks import slow, slow_but
from tests.parity.cases import case, on_ranks

# What may be whole on tp: norms, routers with their biases, attention's per-head scalars aside, the biases of
# row-parallel linears, and MLA's projections to a low rank. Names as the library gives them.
ONE = {"num_hidden_layers": 1}
PLAIN = dict(dedup=False, sequence_parallel=False)
WHOLE = (
    "norm",
    "mlp.gate.weight",
    "router.",
    "shared_expert_gate",
    "o_proj.bias",
    "down_proj_bias",
    "q_a_proj",
    "kv_a_proj",
)


def layout(pm, batch, rank):
    """{name: (elements on this rank, elements in all, axes that shard it)} and the collectives of one
    forward."""
    local = split_batch(batch, *pm.batch_coordinate)
    found = {}
    for name, p in pm.named_parameters():
        axes = tuple(
            axis
            for axis, placement in zip(p.device_mesh.mesh_dim_names, p.placements)
            if placement.is_shard()
        )
        found[name] = (p.to_local().numel(), p.numel(), axes)
    with count_collectives() as log:
        pm(**local)
    return found, [(c.op, c.axes, c.phase, str(c.dtype), len(c.shape)) for c in log]


@pytest.mark.parametrize(
    "model", slow_but(["mixtral"], ["mixtral", "deepseek_v3", "qwen2_moe", "gpt_oss", "llama"])
)
def test_on_tp2_only_small_parameters_are_whole(model):
    overrides = ONE if model in ("mixtral", "qwen2_moe", "llama") else {}
    for found, _ in on_ranks(case(model, "tp=2", overrides=overrides), layout):
        for name, (local, total, axes) in found.items():
            if any(word in name for word in WHOLE):
                assert axes == () and local == total, name
            else:
                assert axes == ("tp",) and local * 2 == total, f"{name} is whole"
        assert sum(local for local, *_ in found.values()) < 0.62 * sum(
            total for _, total, _ in found.values()
        )


def forward_on(axes, log, op=None):
    return [entry for entry in log if entry[1] == axes and entry[2] == "forward" and op in (None, entry[0])]


@pytest.mark.slow
def test_two_tp_all_reduces_per_dense_layer():
    logs = [
        on_ranks(
            case("llama", "tp=2", overrides={"num_hidden_layers": n}, outputs=("loss",), **PLAIN), layout
        )[0][1]
        for n in (1, 2)
    ]
    one, two = (forward_on(("tp",), log) for log in logs)
    assert all(entry[0] == "all_reduce" for entry in two)
    assert len(two) - len(one) == 2
    # Beside the layers: the embedding's sum, and the maximum and the sums of the cross-entropy.
    assert len(two) == 2 * 2 + 3


@pytest.mark.parametrize("mesh,layers", [slow("ep=2", 2), ("ep=2,tp=2", 1)])
def test_two_row_all_to_alls_and_one_exchange_of_counts_per_moe_layer(mesh, layers):
    overrides = {"num_hidden_layers": layers}
    for _, log in on_ranks(case("mixtral", mesh, overrides=overrides, **PLAIN), layout):
        rows = forward_on(("ep",), log, "all_to_all")
        counts = [entry for entry in forward_on(("ep",), log, "all_gather") if entry[3] == "torch.int64"]
        assert len(rows) == 2 * layers and len(counts) == layers
        rest = [entry for entry in forward_on(("ep",), log) if entry not in rows and entry not in counts]
        assert all(entry[0] == "all_reduce" and entry[4] <= 2 for entry in rest), (
            rest
        )  # the loss and its parts
        if mesh == "ep=2,tp=2":  # dispatch and combine add nothing on tp: attention and experts, once each
            assert len(forward_on(("tp",), log, "all_reduce")) == 2 * layers + 3


def test_ppmoe_needs_no_all_to_all():
    for _, log in on_ranks(case("mixtral", "tp=2", overrides=ONE, roles={"expert": "tp"}, **PLAIN), layout):
        assert not [entry for entry in log if entry[0] == "all_to_all"]
        assert len(forward_on(("tp",), log, "all_reduce")) == 2 + 3


@pytest.mark.slow
def test_sequence_parallel_scatters_and_gathers_where_it_summed():
    """Megatron's order: per layer two gathers and two reduce-scatters, and no all-reduce of tokens."""
    logs = [
        on_ranks(case("llama", "tp=2", overrides={"num_hidden_layers": n}, outputs=("loss",)), layout)[0][1]
        for n in (1, 2)
    ]
    one, two = ([entry[0] for entry in forward_on(("tp",), log)] for log in logs)
    assert (
        two.count("reduce_scatter") - one.count("reduce_scatter")
        == two.count("all_gather") - one.count("all_gather")
        == 2
    )
    # Beside the layers: the embedding is scattered, the head gathers, the cross-entropy has its maximum and
    # its sums.
    assert (two.count("reduce_scatter"), two.count("all_gather"), two.count("all_reduce")) == (
        2 * 2 + 1,
        2 * 2 + 1,
        2,
    )


@pytest.mark.parametrize(
    "switches", [{"sequence_parallel": False}, slow({})], ids=["dedup", "sequence parallel"]
)
@pytest.mark.parametrize("roles", [{}, slow({"expert": ("ep", "tp")})], ids=["TED", "folded"])
def test_no_row_is_sent_twice(roles, switches):
    """Over all ranks the rows that go through an all-to-all are those of one copy of each token."""
    plain, cut = (
        sum(
            b
            for log in on_ranks(
                case("mixtral", "ep=2,tp=2", overrides=ONE, roles=roles, **s), all_to_all_bytes
            )
            for b in log
        )
        for s in (PLAIN, switches)
    )
    assert cut * (1 if roles else 2) == plain  # folding cuts tokens into lanes by itself


def all_to_all_bytes(pm, batch, rank):
    with count_collectives() as log:
        pm(**split_batch(batch, *pm.batch_coordinate)).loss.backward()
    return [c.bytes for c in log if c.op == "all_to_all"]


def test_experts_are_split_over_ep_and_the_rest_is_not():
    for found, _ in on_ranks(case("mixtral", "ep=2", overrides=ONE), layout):
        assert {name: axes for name, (_, _, axes) in found.items() if axes} == {
            name: ("ep",) for name in found if ".experts." in name
        }

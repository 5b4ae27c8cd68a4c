"""Layouts, state dicts, checkpoints that change mesh, gathers."""

import pickle

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.tensor import DTensor

import tedfx
from tedfx.errors import ConfigError
from tedfx.optim.shares import Share
from tedfx.runtime.module import ParallelModule
from tedfx.runtime.state_dict import StateError
from tedfx.state.parameters import ParameterLayout, Placed
from tedfx.state.pieces import PiecedTensor
from tests.module import toy
from tests.pool import context

E, F, H = 4, 6, 3
MESHES = {
    "dp2 tp2": ((2, 2), ("dp", "tp")),
    "ep2 tp2": ((2, 2), ("ep", "tp")),
    "dp2 ep2": ((2, 2), ("dp", "ep")),
    "tp2": ((2,), ("tp",)),
    "ep2": ((2,), ("ep",)),
    "dp2": ((2,), ("dp",)),
    "tp4": ((4,), ("tp",)),
    "ep4": ((4,), ("ep",)),
}


class Moe(nn.Module):
    """Names and shapes of a mixture: fused stacked experts, looped experts, a tied table, a router,
    buffers."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Parameter(torch.randn(8, H))
        self.head = self.embed
        self.layers = nn.Module()
        self.layers.gate_up = nn.Parameter(torch.randn(E, 2 * F, H))
        self.layers.interleaved = nn.Parameter(torch.randn(E, H, F * 2))
        self.layers.experts = nn.ModuleList(nn.Linear(H, F) for _ in range(E))
        self.layers.router = nn.Parameter(torch.randn(E, H), requires_grad=False)
        self.layers.register_buffer("correction", torch.randn(E))
        self.register_buffer("table", torch.arange(3), persistent=False)
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.device = nn.Linear(2, 2, bias=False)  # a name that ParallelModule has itself


def layouts(names):
    dp = tuple(a for a in names if a in ("dp", "ep"))
    expert = tuple(a for a in names if a == "dp")
    ep, tp = [("ep", 0)] * ("ep" in names), "tp" in names
    return [
        ParameterLayout("embed", (8, H), None, [("tp", 0)] * tp, dp, aliases=("head",)),
        ParameterLayout(
            "layers.gate_up",
            (E, 2 * F, H),
            (E, 2, F, H),
            ep + [("tp", 2)] * (tp and names != ("tp",)),
            expert,
        ),
        ParameterLayout(
            "layers.interleaved",
            (E, H, 2 * F),
            (E, H, F, 2),
            ep + [("tp", 2)] * (tp and names != ("tp",)),
            expert,
        ),
        *(
            ParameterLayout(
                f"layers.experts.stacked.{n}",
                (E, F, H)[: 3 - (n == "bias")],
                None,
                ep,
                expert,
                True,
                tuple(f"layers.experts.{i}.{n}" for i in range(E)),
            )
            for n in ("weight", "bias")
        ),
        ParameterLayout("layers.router", (E, H), None, (), dp, requires_grad=False),
        ParameterLayout("scalar", (), None, (), dp),
        ParameterLayout("device.weight", (2, 2), None, (), dp),
    ]


def make(mesh_name, seed=0, **options) -> ParallelModule:
    shape, names = MESHES[mesh_name]
    mesh = context(shape, names).device_mesh
    model = Moe(seed)
    state = dict(model.named_parameters(remove_duplicate=False))
    source = state.__getitem__ if dist.get_rank() == 0 else None  # the others have no tensors at all
    batch = tuple(a for a in names if a in ("dp", "ep"))
    return ParallelModule(
        layouts(names),
        source,
        dict(model.named_buffers()),
        mesh,
        None,
        batch,
        non_persistent=["table"],
        options=tedfx.Options(**options),
    )


def same(found, expected):
    assert list(sorted(found)) == list(sorted(expected)), set(found) ^ set(expected)
    for name, value in expected.items():
        full = found[name].full_tensor() if hasattr(found[name], "full_tensor") else found[name]
        assert torch.equal(full.cpu(), value.cpu()), name


def round_trip(mesh_name):
    pm, model = make(mesh_name), Moe()
    expected = model.state_dict()
    same(pm.gather_parameters(buffers=True), expected)
    same(pm.gather_parameters(), dict(model.named_parameters(remove_duplicate=False)))
    state = pm.state_dict()
    same(state, expected)
    kinds = {name: type(entry).__name__ for name, entry in state.items()}
    assert all(
        isinstance(entry, (DTensor, PiecedTensor))
        for name, entry in state.items()
        if name != "layers.correction"
    )
    assert all(entry.shape == expected[name].shape for name, entry in state.items())
    assert all(isinstance(p, DTensor) for p in pm.parameters())
    assert not dict(pm.named_parameters())["layers.router"].requires_grad
    assert dict(pm.named_parameters(remove_duplicate=False))["head"] is dict(pm.named_parameters())["embed"]
    assert not any(
        p.to_local().data_ptr() == q.data_ptr() for p in pm.parameters() for q in model.parameters()
    )

    # the state dict of another module, and the plain one of the user's model
    other = make(mesh_name, seed=3)
    assert other.load_state_dict(pm.state_dict()) == ([], [])
    same(other.state_dict(), expected)
    plain = Moe(seed=5).state_dict()
    other.load_state_dict(plain)
    same(other.gather_parameters(buffers=True), plain)
    del plain["head"]  # one name of a tied tensor is enough
    other.load_state_dict(plain)
    # what torch.save does on each rank
    again = pickle.loads(
        pickle.dumps({n: e for n, e in pm.state_dict().items() if isinstance(e, PiecedTensor)})
    )
    for name, entry in again.items():
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(entry.pieces, state[name].pieces))
    # a copy elsewhere, as asynchronous checkpointing makes it
    assert all(
        torch.equal(e.detach().clone().full_tensor().cpu(), expected[n])
        for n, e in state.items()
        if isinstance(e, PiecedTensor)
    )
    return kinds


@pytest.mark.parametrize("mesh_name", MESHES)
def test_state_dict(ranks, mesh_name):
    shape, _ = MESHES[mesh_name]
    kinds = ranks(torch.Size(shape).numel()).run(round_trip, mesh_name)[0]
    assert kinds["layers.gate_up"] == ("PiecedTensor" if mesh_name in ("dp2 tp2", "ep2 tp2") else "DTensor")
    assert kinds["layers.interleaved"] == "DTensor"  # the sharded factor is the major one
    assert kinds["layers.experts.1.weight"] == ("PiecedTensor" if "ep" in mesh_name else "DTensor")


def save(mesh_name, path, asynchronous=False):
    pm = make(mesh_name)
    if asynchronous:
        dcp.async_save(pm.state_dict(), checkpoint_id=path).result()
    else:
        dcp.save(pm.state_dict(), checkpoint_id=path)


def load(mesh_name, path):
    pm = make(mesh_name, seed=9)
    state = pm.state_dict()
    dcp.load(state, checkpoint_id=path)
    pm.load_state_dict(state)
    same(pm.gather_parameters(buffers=True), Moe().state_dict())


@pytest.mark.parametrize(
    "saved,loaded",
    [
        ("dp2 tp2", "tp2"),
        ("dp2 tp2", "ep2"),
        ("dp2 tp2", "ep2 tp2"),
        ("ep2 tp2", "dp2"),
        ("ep2", "ep2 tp2"),
        ("ep4", "dp2 tp2"),
        ("dp2 ep2", "tp4"),
    ],
)
def test_checkpoint_changes_mesh(ranks, tmp_path, saved, loaded):
    size = lambda name: torch.Size(MESHES[name][0]).numel()
    ranks(size(saved)).run(save, saved, str(tmp_path))
    ranks(size(loaded)).run(load, loaded, str(tmp_path))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_checkpoint_is_the_users_model(ranks, tmp_path, asynchronous):
    """A checkpoint of a mesh loads into the single-device model, and the reverse."""
    ranks(4).run(save, "ep2 tp2", str(tmp_path), asynchronous)
    model = Moe(seed=4)
    state = model.state_dict()
    dcp.load(state, checkpoint_id=str(tmp_path), no_dist=True)
    model.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), Moe().state_dict().values()))
    if not asynchronous:
        dcp.save(Moe().state_dict(), checkpoint_id=str(tmp_path / "plain"), no_dist=True)
        ranks(4).run(load, "ep2 tp2", str(tmp_path / "plain"))


def refuses():
    pm = make("dp2 tp2")
    before = pm.gather_parameters(buffers=True)
    good = Moe(seed=8).state_dict()
    lines = []
    missing, unexpected, shape = dict(good), dict(good), dict(good)
    del missing["layers.experts.2.bias"], missing["layers.correction"]
    unexpected["extra.weight"] = torch.zeros(1)
    unexpected["layers.experts.stacked.weight"] = torch.zeros(E, F, H)
    shape["layers.gate_up"] = torch.zeros(E, F, H)
    for wrong in (missing, unexpected, shape):
        with pytest.raises(StateError) as error:
            pm.load_state_dict(wrong)
        lines.append(str(error.value))
    same(pm.gather_parameters(buffers=True), before)  # nothing was copied
    result = pm.load_state_dict(missing, strict=False)
    assert (
        result.missing_keys == ["layers.experts.2.bias", "layers.correction"] and result.unexpected_keys == []
    )
    with pytest.raises(StateError):
        pm.load_state_dict(shape, strict=False)
    return lines


def test_load_is_strict(ranks):
    missing, unexpected, shape = ranks(4).run(refuses)[0]
    assert missing == "the state dict does not fit: missing: layers.experts.2.bias, layers.correction"
    assert (
        unexpected == "the state dict does not fit: unexpected: extra.weight, layers.experts.stacked.weight"
    )
    assert shape == "the state dict does not fit: wrong shape: layers.gate_up (4, 6, 3), expected (4, 12, 3)"


def other_ranks_values():
    """Values and dtypes are the first rank's; an error there is a line everywhere."""
    rank = dist.get_rank()
    mesh = context((2,), ("dp",)).device_mesh
    layout = [ParameterLayout("w", (2, 3), None, (), ("dp",))]
    make_one = lambda value: ParallelModule(layout, lambda n: value, {}, mesh, None, ("dp",))
    pm = make_one(torch.full((2, 3), float(rank), dtype=torch.bfloat16 if rank == 0 else torch.float64))
    assert pm.w.dtype == torch.bfloat16 and float(pm.w.to_local().sum()) == 0
    lines = []
    for value in (
        torch.zeros(2, 3, device="meta") if rank == 0 else None,
        torch.zeros(3, 2) if rank == 0 else None,
    ):
        with pytest.raises(ConfigError) as error:
            make_one(value)
        lines.append(str(error.value))
    return lines


def test_first_rank_counts(ranks):
    (meta, shape), (meta_1, shape_1) = ranks(2).run(other_ranks_values)
    assert "w is on the meta device" in meta and "first rank" in meta_1
    assert "w has shape (3, 2)" in shape and shape == shape_1


class FakeMesh:
    """What Placed asks of a mesh, at any coordinate of any mesh."""

    def __init__(self, coordinate, **sizes):
        self.mesh_dim_names, self.mesh, self._coordinate = (
            tuple(sizes),
            torch.empty(*sizes.values()),
            list(coordinate),
        )

    def get_coordinate(self):
        return self._coordinate


@pytest.mark.parametrize(
    "layout,message",
    [
        (ParameterLayout("w", (6, 4), (3, 8), {}, ()), "does not refine shape"),
        (ParameterLayout("w", (6, 4), (6, 4, 2), {}, ()), "does not refine shape"),
        (ParameterLayout("w", (6, 4), None, {"xx": 0}, ()), "axis 'xx' is not on the mesh"),
        (ParameterLayout("w", (6, 4), None, {"tp": 0}, ("tp",)), "both shards it and reduces"),
        (ParameterLayout("w", (6, 4), None, {"tp": 2}, ()), "has no dim 2"),
        (ParameterLayout("w", (6, 4), None, [("tp", 0), ("dp", 0)], ()), "must stand in mesh order"),
    ],
)
def test_wrong_layouts(layout, message):
    with pytest.raises(ConfigError, match=message):
        Placed(layout, FakeMesh((0, 0), dp=2, tp=3))


@pytest.mark.parametrize(
    "layout",
    [
        ParameterLayout("w", (12, 5), (12, 5), {"dp": 0, "tp": 0}),
        ParameterLayout("w", (24, 5), (2, 12, 5), {"dp": 1, "tp": 1}),
        ParameterLayout("w", (24, 5), (2, 2, 6, 5), {"dp": 1, "tp": 2}),
        ParameterLayout("w", (2, 24, 12), (2, 4, 2, 3, 3, 4), {"dp": 2, "tp": 4}),
        ParameterLayout("w", (1, 6, 1), (1, 1, 3, 2, 1), {"tp": 2}),
        ParameterLayout("w", (4, 6, 2), (4, 2, 3, 2), {"dp": 0, "tp": 2}, sources=("a", "b", "c", "d")),
        ParameterLayout("w", (2, 3), (2, 3), {}),
        ParameterLayout("w", (), (), {}),
        ParameterLayout("w", (5, 4), None, {"tp": 0}),  # pieces of 2, 2, 1; then of none
        ParameterLayout("w", (7, 4), None, {"dp": 0, "tp": 0}),
        ParameterLayout("w", (4, 2), None, {"tp": 0}, sources=("a", "b", "c", "d")),
        ParameterLayout("w", (10, 8), (2, 5, 4, 2), {"tp": 1, "dp": 2}),
        ParameterLayout("w", (12, 4), (3, 4, 4), {"dp": 0, "tp": 1}),  # both in one dim
    ],
)
def test_pieces_tile_the_tensor(layout):
    """Over all coordinates the boxes cover each element as often as the tensor is replicated, and hold the
    right values."""
    one = layout.shape[1:] if layout.sources else layout.shape
    full = {
        name: torch.arange(torch.Size(one).numel()).reshape(one) + 1000 * i
        for i, name in enumerate(layout.names)
    }
    seen = {name: torch.zeros(one, dtype=torch.int64) for name in full}
    whole = torch.stack(list(full.values())) if layout.sources else full["w"]
    for dp in range(2):
        for tp in range(3):
            placed = Placed(layout, FakeMesh((dp, tp), dp=2, tp=3))
            local = torch.full(placed.local_shape, -1)
            for name, tensor in full.items():
                placed.whole.cut(name, tensor, local)
                for offsets, where in placed.whole.chunks[name]:
                    seen[name][tuple(slice(o, o + n) for o, n in zip(offsets, local[where].shape))] += 1
            view = whole.reshape(layout.view)
            for dim, (start, length) in enumerate(zip(placed.whole.starts, placed.whole.lengths)):
                view = view.narrow(dim, start, length)
            assert torch.equal(local, view.reshape(placed.local_shape))
    copies = 6 // torch.Size([{"dp": 2, "tp": 3}[axis] for axis, _ in layout.shards]).numel()
    assert all((count == copies).all() for count in seen.values())


@pytest.mark.parametrize(
    "layout",
    [
        ParameterLayout("w", (4, 5), None, {"tp": 0}, ("dp",)),  # 2, 2 and none
        ParameterLayout("w", (6, 4), None, {"tp": 1}, ("dp",)),  # none behind the dim of the shares
        ParameterLayout("w", (5, 7), None, {"tp": 1}, ("dp",)),  # shares are not equal either
        ParameterLayout("w", (8, 6), (2, 4, 6), {"tp": 1}, ("dp",)),  # gate and up in one
        ParameterLayout("w", (10, 6), (5, 2, 6), {"tp": 0}, ("dp",)),  # heads
        ParameterLayout("w", (10,), (5, 2), {"tp": 0}, ("dp",)),  # their bias
        ParameterLayout("w", (4, 6, 2), None, {"tp": 0}, ("dp",), sources=("a", "b", "c", "d")),
        ParameterLayout("w", (4, 6, 2), None, {"tp": 2}, ("dp",), sources=("a", "b", "c", "d")),
    ],
)
@pytest.mark.parametrize("stage", [1, 3])
def test_shares_tile_unequal_and_empty_pieces(layout, stage):
    """What all ranks hold of a parameter is all of it, once; and a rank's shares are gathered into its piece,
    by the cut that it has and by that which the graph has for all ranks."""
    seen = {name: torch.zeros(layout.user_shape, dtype=torch.int64) for name in layout.names}
    for tp in range(3):
        for dp in range(2):
            placed = Placed(layout, FakeMesh((dp, tp), dp=2, tp=3), stage)
            assert placed.uneven
            copies = 1 if placed.share_dim is not None else 2
            for name, chunks in placed.share.chunks.items():
                local = torch.empty(placed.share.shape)
                for offsets, where in chunks:
                    box = tuple(slice(o, o + n) for o, n in zip(offsets, local[where].shape))
                    seen[name][box] += 2 // copies
            if placed.share_dim is None:
                continue
            coordinate = {(): 0, ("dp",): dp, ("tp",): tp}
            assert placed.common_cut.at(coordinate.__getitem__) == placed.share_cut
            whole = torch.arange(placed.whole.numel).view(placed.local_shape)
            rows = placed.share_cut.spread(whole)
            assert torch.equal(rows[dp][: placed.share.numel], placed.share_of(whole).reshape(-1))
            if stage == 1:
                share = object.__new__(Share)
                share.placed, share.local = placed, lambda: whole
                assert torch.equal(share.rows().reshape(-1), rows[dp][: placed.share.numel])
            assert torch.equal(placed.share_cut.collect(rows), whole)
            assert torch.equal(placed.share_cut.collect(rows, torch.empty_like(whole)).view_as(whole), whole)
    assert all((count == 2).all() for count in seen.values())


def names_of_toy():
    pm = toy.parallel(context((2, 2), ("dp", "tp")).device_mesh)
    return [n for n, _ in pm.named_parameters()], list(pm.state_dict())


def test_names(ranks):
    parameters, state = ranks(4).run(names_of_toy)[0]
    assert set(parameters) == {n for n, _ in toy.Mlp().named_parameters() if not n.startswith("scales")} | {
        "scales.*.weight"
    }
    assert set(state) == set(toy.Mlp().state_dict())

"""Mixed precision on ranks: `precision=`, autocast around calls and in the model, float16 with a dynamic loss
scale."""

import copy

import pytest
import torch
import torch.distributed as dist

import tedfx
from tedfx.errors import ConfigError, TedfxError
from tedfx.optim import LossScale, ShardedOptimizer
from tedfx.saving.folder import CheckpointError
from tedfx.trace.precision import cast_model, parameter_dtypes
from tests.marks import slow
from tests.module.mixed import Dense, Mixture, tokens
from tests.pool import context

EXAMPLE = tokens(0)


def made(kind, *args):
    torch.manual_seed(0)
    return kind(*args)


def mesh(shape, names):
    return context(shape, names).device_mesh


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters(remove_duplicate=False)}


def worst(found, expected):
    """The largest relative difference of a tensor."""
    return max(
        float((found[name].double() - e.double()).norm() / e.double().norm().clamp_min(1.0))
        for name, e in expected.items()
    )


def share(pm, batch):
    index, count = pm.batch_coordinate
    return {name: x.chunk(count)[index] for name, x in batch.items()}


# ---- precision= --------------------------------------------------------------------------------------------


def one_rank(precision):
    """On a mesh of one rank: bit by bit the model with cast parameters; the user's model is untouched,
    buffers keep their dtype."""
    model, x = made(Dense), torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(1))
    before = {
        name: (t, t.clone())
        for name, t in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items()
    }
    pm = tedfx.parallelize(model, mesh((1,), ("dp",)), example_inputs={"x": x}, precision=precision)
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(
        after[name] is t and torch.equal(t, value) and t.dtype == torch.float32
        for name, (t, value) in before.items()
    )
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert all(p.dtype == dtype for p in pm.parameters()) and pm.table.dtype == torch.float32
    assert all(
        value.dtype == (torch.float32 if name == "table" else dtype)
        for name, value in pm.state_dict().items()
    )
    single = cast_model(copy.deepcopy(model), precision)
    found, expected = pm(x), single(x)
    found.backward()
    expected.backward()
    assert torch.equal(found, expected)
    got = pm.gather_gradients()
    assert all(
        torch.equal(got[name], grad) and grad.dtype == dtype for name, grad in gradients(single).items()
    )
    (note,) = [
        note for record in pm.history if record.name == "check_capture" for note in record.result.notes
    ]
    assert note.startswith("checked against the model")


@pytest.mark.parametrize("precision", ["bf16", slow("fp16")])
def test_parameters_are_cast(ranks, precision):
    ranks(1).run(one_rank, precision)


def without_weights():
    """On the meta device: what the initialisation gives in the model's own dtype, cast; tied weights stay
    tied; ranks that differ in precision are told."""
    torch.manual_seed(7)
    real = Mixture()
    with torch.device("meta"):
        model = Mixture()
    pm = tedfx.parallelize(model, mesh((2,), ("ep",)), precision="bf16")
    assert all(p.is_meta and p.dtype == torch.float32 for p in model.parameters())

    def init(module):
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding | torch.nn.LayerNorm):
            module.reset_parameters()
        if hasattr(module, "table"):
            module.table.copy_(real.table)

    pm.init_weights(init, seed=7)
    torch.manual_seed(7)
    real.apply(init)
    full = pm.gather_parameters()
    assert all(torch.equal(full[name], p.to(torch.bfloat16)) for name, p in real.named_parameters())
    assert pm.head.weight is pm.embed.weight and pm.table.dtype == torch.float32
    loss = pm(**share(pm, tokens(1)))
    assert abs(float(loss.detach()) - float(cast_model(real, "bf16")(**tokens(1)).detach())) < 2e-2
    with pytest.raises(TedfxError, match="Every rank must parallelize the same model"):
        tedfx.parallelize(real, mesh((2,), ("ep",)), precision="bf16" if dist.get_rank() else None)


@pytest.mark.slow
def test_a_model_without_weights_is_cast(ranks):
    ranks(2).run(without_weights)


def test_a_precision_that_does_not_exist():
    for precision in ("int8", torch.bfloat16):
        with pytest.raises(ConfigError, match=r"precision=.*: one of 'fp32', 'bf16', 'fp16'"):
            tedfx.Options(precision=precision)


def test_what_a_library_model_keeps_in_float32():
    transformers = pytest.importorskip("transformers")
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    model._keep_in_fp32_modules, model._keep_in_fp32_modules_strict = {"norm"}, {"mlp.gate.weight"}
    kept = lambda precision: {
        n for n, dtype in parameter_dtypes(model, precision).items() if dtype == torch.float32
    }
    assert kept("bf16") == {"model.layers.0.mlp.gate.weight"}
    assert kept("fp16") == {n for n, _ in model.named_parameters() if "norm" in n} | kept("bf16")


# ---- autocast ----------------------------------------------------------------------------------------------


def around_one_rank():
    """On a mesh of one rank: bit by bit eager autocast; each region is a signature of its own, and the plain
    call stays plain."""
    model, x = made(Dense), torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(1))
    pm = tedfx.parallelize(model, mesh((1,), ("dp",)), example_inputs={"x": x})
    for dtype in (torch.bfloat16, None):
        pm.zero_grad()
        model.zero_grad()
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            found, expected = pm(x), model(x)
            assert torch.is_autocast_enabled("cpu") == (dtype is not None)
        found.backward()
        expected.backward()
        got = pm.gather_gradients()
        assert torch.equal(found, expected) and all(
            torch.equal(got[name], grad) for name, grad in gradients(model).items()
        )
    assert [str(s.autocast) for s in pm.programs] == ["None", "autocast bfloat16"]
    assert all(name in str(list(pm.programs)[1]) for name in ("x: float32[3]", "autocast bfloat16"))


def test_autocast_around_a_call(ranks):
    ranks(1).run(around_one_rank)


def regions(shape, names):
    """Regions in the model and around it: much nearer to one device under the same autocast than that is to
    float32, on every parameter together."""
    found, losses = {}, {}
    for kind in ("inside", "around", "float32"):
        model = made(Mixture, kind == "inside")
        pm = tedfx.parallelize(model, mesh(shape, names), check="none")
        for module, batch in ((pm, share(pm, EXAMPLE)), (model, EXAMPLE)):
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == "around"):
                loss = module(**batch)
            loss.backward()
            found[kind, module is pm] = pm.gather_gradients() if module is pm else gradients(model)
            losses[kind, module is pm] = float(loss.detach())
        dtypes = {
            n.meta["val"].dtype
            for n in pm.graph.graph.nodes
            if "linear" in n.name
            and n.target is not torch.ops.aten.linear.default
            and isinstance(n.meta.get("val"), torch.Tensor)
        }
        assert dtypes == {torch.float32 if kind == "float32" else torch.bfloat16}, (kind, dtypes)
    total = lambda a, b: float(
        torch.cat([(a[n] - b[n]).flatten() for n in b]).norm() / torch.cat([b[n].flatten() for n in b]).norm()
    )
    assert total(found["float32", True], found["float32", False]) < 1e-6
    for kind in ("inside", "around"):
        near, far = (
            total(found[kind, True], found[kind, False]),
            total(found[kind, False], found["float32", False]),
        )
        assert near < 4e-3 and near < 0.7 * far, (kind, near, far)
        assert abs(losses[kind, True] / losses[kind, False] - 1) < 1e-3, losses
    return {
        kind: (
            total(found[kind, True], found[kind, False]),
            total(found[kind, False], found["float32", False]),
        )
        for kind in ("inside", "around")
    }


@pytest.mark.parametrize("axis", [slow("tp")])
def test_autocast_on_two_ranks(ranks, axis):
    ranks(2).run(regions, (2,), (axis,))


# ---- float16 -----------------------------------------------------------------------------------------------

SCALE, STEPS, BAD = 2.0**12, 6, (1, 3)


def by_hand():
    """One device: float16 parameters, float32 masters, a scaled loss, clipping at 1, AdamW, the steps in BAD
    left out. (parameters at the start, at the end)"""
    model, scale = cast_model(made(Mixture), "fp16"), SCALE
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    masters = {name: torch.nn.Parameter(p.float()) for name, p in start.items()}
    optimizer = torch.optim.AdamW(masters.values(), lr=0.02)
    for step in range(STEPS):
        model.zero_grad()
        (model(**tokens(step)) * scale).backward()
        if step in BAD:
            scale /= 2
            continue
        for name, p in model.named_parameters():
            masters[name].grad = p.grad.float() / scale
        torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(masters[name])
    return start, {name: p.detach() for name, p in model.named_parameters()}


def saved(pm, optimizer, shape, names, zero, folder):
    """A checkpoint has the loss scale; a run of another precision is refused, in one line."""
    tedfx.Checkpointer(folder, pm, optimizer).save(STEPS)
    for precision in ("fp16", "bf16")[: 1 + (zero == 0)]:
        other = tedfx.parallelize(
            made(Mixture),
            mesh(shape, names),
            precision=precision,
            zero=zero,
            check="none",
            traces=list(p.compilation for p in pm.programs.values()),
        )
        again = ShardedOptimizer(other, torch.optim.AdamW, lr=0.02, max_norm=1.0, loss_scale="dynamic")
        if precision == "bf16":
            with pytest.raises(CheckpointError, match="other dtypes") as error:
                tedfx.Checkpointer(folder, other, again).load()
            assert "\n" not in str(error.value)
        else:
            assert tedfx.Checkpointer(folder, other, again).load().step == STEPS
            assert (
                (again.loss_scale, again.skipped)
                == (optimizer.loss_scale, optimizer.skipped)
                == (SCALE / 4, 2)
            )


def overflow(shape, names, zero, folder):
    """A loss that overflows on one rank alone: nobody steps, all halve the scale; the rest is the single
    device's run."""
    pm = tedfx.parallelize(made(Mixture), mesh(shape, names), precision="fp16", zero=zero, check="none")
    optimizer = ShardedOptimizer(
        pm, torch.optim.AdamW, lr=0.02, max_norm=1.0, loss_scale=LossScale(init_scale=SCALE)
    )
    history = []
    for step in range(STEPS):
        optimizer.zero_grad()
        factor = 1e9 if step in BAD and dist.get_rank() == BAD.index(step) else 1.0
        before = {name: p.to_local().clone() for name, p in pm.named_parameters()}
        (optimizer.scale(pm(**share(pm, tokens(step)))) * factor).backward()
        optimizer.step()
        assert bool(torch.isfinite(optimizer.grad_norm)) == (step not in BAD)
        same = [torch.equal(p.to_local(), before[name]) for name, p in pm.named_parameters()]
        assert all(same) if step in BAD else not any(same)
        history.append((optimizer.loss_scale, optimizer.skipped))
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, history)
    assert everyone[0] == everyone[1] and history == [
        (SCALE, 0),
        (SCALE / 2, 1),
        (SCALE / 2, 1),
        (SCALE / 4, 2),
        (SCALE / 4, 2),
        (SCALE / 4, 2),
    ]
    saved(pm, optimizer, shape, names, zero, folder)
    start, end = by_hand()
    moved, apart = worst(end, start), worst(pm.gather_parameters(), end)
    assert apart < 2e-3 and moved > 0.1, (apart, moved)
    return apart, moved


@pytest.mark.parametrize("axis,zero", [slow("ep", 0), ("dp", 2)])
def test_float16_overflow_on_one_rank(ranks, axis, zero, tmp_path):
    ranks(2).run(overflow, (2,), (axis,), zero, str(tmp_path))

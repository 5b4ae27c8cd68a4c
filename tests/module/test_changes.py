"""What changes after `parallelize`: it counts, as on a single device, or it is one line at the next call."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import tedfx
from tests.marks import slow
from tests.module import changing
from tests.pool import context

CHANGES = (
    changing.nothing,
    changing.outside,
    changing.again,
    changing.through_and_absent,
    changing.unread,
)


@pytest.mark.parametrize(
    "axis, options, steps, programs",
    [
        slow("ep", {"check": "none"}, CHANGES, 3),
        slow("dp", {"zero": 3}, (changing.nothing, changing.freeze, changing.nothing), 1),
        slow("dp", {"layered": True}, (changing.nothing, changing.nothing), 1),
    ],
    ids=["attributes", "frozen later", "layered"],
)
def test_as_on_a_single_device(ranks, axis, options, steps, programs):
    """With a mixture whose buffers are assigned, not written: losses, parameters and buffers after the last
    step."""
    for worst, warned, count in ranks(2).run(changing.compare, (2,), (axis,), options, steps):
        assert worst < 1e-13 and count == programs
        assert len(warned) == (programs > 1) and all("config.coef" in line for line in warned)


def line(function, *args):
    try:
        function(*args)
    except tedfx.TedfxError as error:
        return str(error)


def _mesh():
    return context((1,), ("dp",)).device_mesh


def fixed():
    model = changing.Model().double()
    pm = tedfx.parallelize(model, _mesh(), example_inputs=changing.data(0))
    head = pm.get_parameter("head.weight")

    def call():
        return pm(**changing.data(0))

    def with_hook(register):
        handle = register(lambda x: None)
        found = line(call)
        handle.remove()
        return found

    def with_grad(parameter):
        parameter.requires_grad_(True)
        found = line(call)
        parameter.requires_grad_(False)
        return found

    def of_part(part):
        part.eval()
        found = line(call)
        part.train()
        return found

    found = {
        "frozen": line(setattr, pm, "frozen", nn.Parameter(torch.ones(16))),
        "head": line(setattr, pm, "head", nn.Linear(2, 2)),
        "gate": line(setattr, pm.mixture, "gate", nn.Linear(2, 2)),
        "register_parameter": line(pm.register_parameter, "w", nn.Parameter(torch.ones(2))),
        "buffer bias": line(setattr, pm.mixture, "bias", torch.ones(2)),
        "meta": line(pm.to, "meta"),
        "float16": line(pm.half),
        "state_dict": line(pickle.dumps, pm),
        "save_checkpoint": line(torch.save, pm, io.BytesIO()),
        "copied": line(copy.deepcopy, pm),
        "part of": line(pm.mixture, torch.ones(2)),
        "never called": line(pm.mixture.register_forward_hook, print),
        "(register_hook)": with_hook(head.register_hook),
        "(register_post_accumulate_grad_hook)": with_hook(head.register_post_accumulate_grad_hook),
        "was frozen": with_grad(pm.frozen),
        "eval mode": of_part(pm.mixture),
    }
    seen = []
    handle = pm.register_forward_hook(lambda *args: seen.append(1))
    pm.mixture.bias = torch.full((4,), 2.0, dtype=torch.float64)
    call().backward()
    handle.remove()
    fine = [
        line(pm.to, "cpu"),
        line(torch.optim.SGD(pm.parameters(), lr=0.1).step),
        None if seen == [1] else "no hook",
    ]
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    found["would train nothing"] = line(other.step)
    model(**changing.data(0)).backward()
    fine.append(line(other.step))
    model.mixture.gate = nn.Linear(16, 4).double()
    found["submodule gate"], found["submodule gate of the model"] = line(call), line(call)
    return found, fine


def test_what_would_have_no_effect_is_a_line(ranks):
    ((found, fine),) = ranks(1).run(fixed)
    for words, text in found.items():
        assert text is not None and words in text and "\n" not in text, (words, text)
    assert fine == [None] * len(fine)


class Tabled(changing.Model):
    def __init__(self):
        super().__init__()
        self.table = torch.ones(16)

    def forward(self, input_ids, labels):
        return super().forward(input_ids, labels) * self.table.sum()


def tensor_attribute():
    model = Tabled()
    pm = tedfx.parallelize(model, _mesh(), example_inputs=changing.data(0))
    pm(**changing.data(0))
    model.table.mul_(2)
    return [line(lambda: pm(**changing.data(0))) for _ in range(2)]


def test_a_tensor_attribute_stays(ranks):
    ((first, second),) = ranks(1).run(tensor_attribute)
    assert first == second and first.startswith(
        "table of the model, a tensor that is neither parameter nor buffer, changed after parallelize"
    )


def prepared():
    from torch.distributed.fsdp import fully_shard

    part = changing.Model()
    part.mixture.compile()
    sharded = changing.Model()
    fully_shard(sharded, mesh=_mesh())
    models = {
        "DistributedDataParallel": nn.parallel.DistributedDataParallel(changing.Model()),
        "FSDP": sharded,
        "the model is compiled": torch.compile(changing.Model()),
        "module mixture is compiled": part,
        "ParallelModule already": tedfx.parallelize(
            changing.Model(), _mesh(), example_inputs=changing.data(0)
        ),
    }
    return {words: line(tedfx.parallelize, model, _mesh()) for words, model in models.items()}


def test_models_that_something_else_has_prepared(ranks):
    (found,) = ranks(1).run(prepared)
    for words, text in found.items():
        assert text is not None and words in text and "\n" not in text, (words, text)


def reused():
    from tedfx.trace.export import trace

    model = changing.Model()
    traced = trace(model, kwargs=changing.data(0))
    first = tedfx.parallelize(model, _mesh(), example_inputs=changing.data(0), traces=[traced])
    done = first._programs.current().compilation
    same = tedfx.parallelize(model, _mesh(), example_inputs=changing.data(0), traces=[done])
    other = changing.Model()
    other.head.weight.requires_grad_(False)
    frozen = tedfx.parallelize(other, _mesh(), example_inputs=changing.data(0), traces=[done, traced])
    scaled = changing.Model()
    scaled.scale = 3.0
    scaled = tedfx.parallelize(scaled, _mesh(), example_inputs=changing.data(0), traces=[done, traced])
    return [
        done.trace.observed is traced.observed,
        *(pm._programs.current().compilation is done for pm in (same, frozen, scaled)),
        scaled(**changing.data(0)).item() != first(**changing.data(0)).item(),
    ]


@pytest.mark.slow
def test_a_trace_is_reused_where_it_holds(ranks):
    """Not for a model with other parameters frozen, nor with another value of what was read."""
    assert ranks(1).run(reused) == [[True, True, False, False, True]]

"""A loss computed outside the model, from logits.

    torchrun --standalone --nproc-per-node 4 examples/external_loss.py

Each rank holds the logits of its own rows, with the whole vocabulary. `backward()` from a loss that a rank
computes on them gives the gradient of the SUM of the ranks' local losses, a rank being a coordinate on the
batch axes. So the local sum is divided by the count of the global batch, not of the local one. Below, the
labels are valid unevenly over the ranks, where a mean of local means would be wrong; the gradients are
compared with those of the model's own loss.
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import MixtralConfig, MixtralForCausalLM

import tedfx


def main():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "tp"))
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    pm = tedfx.parallelize(MixtralForCausalLM(config), mesh)

    ids = torch.randint(256, (8, 32), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:3] = -100  # the first ranks have fewer valid labels than the others
    index, count = pm.batch_coordinate
    ids, labels = ids.chunk(count)[index], labels.chunk(count)[index]

    # 1. The model's own loss.
    pm(input_ids=ids, labels=labels).loss.backward()
    wanted = pm.gather_gradients()
    pm.zero_grad()

    # 2. The same from logits: local sum over global count.
    logits = pm(input_ids=ids).logits
    targets = labels[:, 1:].flatten()
    total = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets, ignore_index=-100, reduction="sum"
    )
    valid = (targets != -100).sum()
    for axis in ("ep",):  # the batch axes of this mesh: those of dp and ep that it has
        dist.all_reduce(valid, group=mesh.get_group(axis))
    (total / valid).backward()
    found = pm.gather_gradients()

    worst = max(
        (found[name] - wanted[name]).norm().item() / max(wanted[name].norm().item(), 1e-12) for name in wanted
    )
    if dist.get_rank() == 0:
        print(
            f"gradients of the outside loss against the model's own: largest relative difference {worst:.1e}"
        )
    return worst > 1e-4


sys.exit(tedfx.run(main))

"""A pass of your own: counts the collectives of each layer and names their nodes after it.

    torchrun --standalone --nproc-per-node 4 examples/custom_pass.py

A pass is a frozen dataclass. Its fields are its options, its docstring is its algorithm, and its contract is
`Pass[LocalGraph]`: it works on the graph that a rank runs, so it stands behind the pass that makes one. It
changes `program.graph_module` in place and says what it saw. `TEDFX_PRINT_AFTER=name_collectives` prints the
graph before and after it.
"""

import re
from collections import Counter
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import MixtralConfig, MixtralForCausalLM

import tedfx
from tedfx.analysis.cost import Cost
from tedfx.passes.base import Pass, PassResult
from tedfx.stages.graphs import LocalGraph


@dataclass(frozen=True)
class NameCollectives(Pass[LocalGraph]):
    """Count the collectives of each layer and name their nodes after it.

    1. What a node sends is what `tedfx explain` says of it: `Cost` lists the collectives of a local graph,
       node by node.
    2. The layer of a collective is the first number in the path of the module that its node comes from.
    3. Its node is renamed to `{prefix}{layer}_{collective}_{number in the layer}`: the printed graph shows
       where it belongs.
    """

    prefix: str = "layer"

    def __call__(self, program: LocalGraph) -> PassResult:
        result, counts, nodes, sent = PassResult(), Counter(), Counter(), Cost(program).by_node
        for node in program.graph_module.graph.nodes:
            number = sum(item.phase == "forward" for item in sent.get(node.name, ()))
            if not number:
                continue
            result.matches += 1
            paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
            numbers = re.findall(r"\d+", paths[-1]) if paths else []
            place = f"{self.prefix}{numbers[0]}" if numbers else "outside"
            counts[place] += number
            nodes[place] += 1
            node.name = f"{place}_{node.target.__name__.partition('.')[0]}_{nodes[place]}"
            result.changes += 1
        result.notes = [f"{place}: {count} collectives in forward" for place, count in sorted(counts.items())]
        return result


def main():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "tp"))
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    pm = tedfx.parallelize(
        MixtralForCausalLM(config), mesh, passes=[*tedfx.default_passes(), NameCollectives()]
    )

    ids = torch.randint(256, (4, 32), generator=torch.Generator().manual_seed(1))
    index, count = pm.batch_coordinate
    mine = ids.chunk(count)[index]
    pm(input_ids=mine, labels=mine).loss.backward()
    if dist.get_rank() == 0:
        record = next(r for r in pm.history if r.name == "name_collectives")
        print(record, *record.result.notes, sep="\n  ")
        print(*(node.name for node in pm.graph.graph.nodes if re.match(r"(layer\d+|outside)_", node.name)))


tedfx.run(main)

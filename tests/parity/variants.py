"""Changes to a model before it is traced, by name."""


def freeze(model):
    """Embedding, norms, routers and one expert tensor do not train."""
    frozen = 0
    for name, p in model.named_parameters():
        if "embed" in name or "norm" in name or "gate.weight" in name or name.endswith("layers.0.mlp.experts.down_proj"):
            p.requires_grad_(False)
            frozen += 1
    assert frozen > 4


def widen_router(model):
    """Routers with strong preferences: counts per expert are very uneven."""
    for name, p in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            p.data.mul_(20)
            p.data[0].add_(0.3)

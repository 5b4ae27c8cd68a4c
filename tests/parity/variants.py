"""Changes to a model before it is traced, by name; two joined by `+` are both made."""


def freeze(model):
    """Embeddings, norms, routers and one tensor of experts do not train."""
    frozen = 0
    for name, p in model.named_parameters():
        if "embed" in name or "norm" in name or "gate.weight" in name or name.endswith("layers.0.mlp.experts.down_proj"):
            p.requires_grad_(False)
            frozen += 1
    assert frozen > 4

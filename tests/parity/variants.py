"""Changes to a model before it is traced, by name; two joined by `+` are both made."""


def freeze(model):
    """Embeddings, norms, routers and one tensor of experts do not train."""
    frozen = 0
    for name, p in model.named_parameters():
        if (
            "embed" in name
            or "norm" in name
            or "gate.weight" in name
            or name.endswith("layers.0.mlp.experts.down_proj")
        ):
            p.requires_grad_(False)
            frozen += 1
    assert frozen > 4


def ties(model):
    """All experts have the same score: every choice is a tie, and the first experts overflow."""
    for name, p in model.named_parameters():
        if "router" in name:
            p.data.zero_()


def one_expert(model):
    """Every token's first choice is one expert; the last expert is nobody's choice."""
    for name, p in model.named_parameters():
        if name.endswith("router.bias"):
            p.data[:] = 0.0
            p.data[1], p.data[-1] = 50.0, -50.0

"""What a program ends with, and losses that are added to it."""

from __future__ import annotations

from tests.fuzz.grammar.rowwise import norm
from tests.fuzz.program import Writer, loss, piece


def head(w: Writer) -> str:
    """The logits: a head of its own or the embedding's weight."""
    if w.chance(0.25):
        return "F.linear(x, self.embed.weight)"
    return f"{w.linear('head', None, w.vocabulary)}({norm(w)})"


@loss(weight=4)
def cross_entropy(w: Writer):
    options = w.any(
        "",
        "",
        ", label_smoothing=0.1",
        ", reduction='sum') / (labels != -100).sum(",
        ", reduction='none').sum() / input_ids.numel(",
        ", reduction='sum') / (x.shape[0] * x.shape[1]",
    )
    w.lines(f"logits = {head(w)}")
    w.lines(f"loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(){options})")
    if w.chance(0.3):
        w.outputs["rows_logits"] = "logits"


@loss(weight=1)
def causal_shift(w: Writer):
    w.lines(
        f"logits = {head(w)}\nloss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), "
        f"labels[:, 1:].{w.any('flatten()', 'reshape(-1)')}, ignore_index=-100)"
    )


@loss(weight=1)
def class_dim_one(w: Writer):
    w.lines(f"loss = F.cross_entropy({head(w)}.transpose(1, 2), labels)")


@loss(weight=1)
def log_probabilities(w: Writer):
    w.lines(f"""
    p = {head(w)}.log_softmax(-1)
    kept = labels != -100
    n = -p.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    loss = {w.any("(n * kept).sum() / kept.sum()", "((n * kept).sum(1) / kept.sum(1).clamp(min=1)).mean()", "torch.where(kept, n, 0).mean()", "(n * kept).sum() / x.shape[0]", "(n * kept * torch.arange(1, x.shape[1] + 1)).mean()")}
    """)


@loss(weight=2)
def regression(w: Writer):
    w.lines(f"y = {w.linear('head')}({norm(w)})")
    w.lines(
        w.any(
            "loss = F.mse_loss(y, target)",
            "loss = (y - target).square().sum() / y.shape[2]",
            "loss = (y - target).square().sum(-1).mean()",
            "loss = F.smooth_l1_loss(y, target)",
            "loss = F.mse_loss(y, target, reduction='sum') / target.numel()",
            "loss = ((y - target) ** 2).mean(1).sum() / len(y)",
            "loss = 1 - F.cosine_similarity(y, target, dim=-1).mean()",
            "loss = torch.linalg.vector_norm(y - target) / 10",
            "loss = (y - target).abs().mean((0, 1)).sum()",
            "loss = F.kl_div(y.log_softmax(-1), target.softmax(-1), reduction='batchmean') / 6",
        )
    )
    if w.chance(0.3):
        w.outputs["rows_y"] = "y.detach()"


@loss(weight=1)
def contrastive(w: Writer):
    w.lines(f"""
    a, b = {w.linear("a")}(x).mean(1), target.mean(1)
    similarity = {w.any("F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T * 3", "a @ b.T")}
    loss = F.cross_entropy(similarity, torch.arange(x.shape[0]))
    """)


@loss(weight=1)
def first_token(w: Writer):
    w.lines(
        "loss = "
        f"F.cross_entropy({w.linear('head', None, 5)}(x{w.any('[:, 0]', '.mean(1)', '[:, -1]', '.amax(1)', '.select(1, 1)')}), "
        ""
        "input_ids[:, 0] % 5)"
    )


@piece("auxiliary")
def auxiliary_loss(w: Writer):
    lin = f"{w.linear('aux', None, 4)}(x)"
    w.losses.append(
        w.any(
            "0.1 * x.square().mean()",
            f"0.01 * {lin}.logsumexp(-1).square().mean()",
            "0.1 * x.mean((0, 1)).square().sum()",
            "0.1 * x.std(0).mean()",
            "0.01 * sum(p.square().sum() for p in self.parameters())",
            f"0.1 * F.binary_cross_entropy_with_logits({lin}[..., 0], (labels > 3).to(x.dtype))",
            "0.1 * (x.flatten(0, 1).T @ x.flatten(0, 1) / 48 - torch.eye(x.shape[-1])).square().mean()",
            "0.1 * x[:, 1:].sub(x[:, :-1]).square().mean()",
            f"0.1 * torch.special.entr({lin}.softmax(-1)).sum(-1).mean()",
            "0.01 * self.embed.weight.norm()",
        )
    )
    w.lines(f"x = x + 0.2 * {w.linear('lin')}(x)")

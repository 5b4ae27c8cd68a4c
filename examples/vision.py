"""A vision transformer with mixtures of experts (V-MoE) that reads handwritten digits.

    torchrun --standalone --nproc-per-node 4 examples/vision.py                     # ep=2, tp=2
    torchrun --standalone --nproc-per-node 4 examples/vision.py --mesh dp=2,ep=2
    torchrun --standalone --nproc-per-node 4 examples/vision.py --mesh dp=2,tp=2 --roles expert=tp
    torchrun --standalone --nproc-per-node 4 examples/vision.py --torchvision       # torchvision's ViT

The pictures are the 1797 digits of 8 x 8 grey values that scikit-learn ships (`pip install scikit-learn`);
every fifth is held out. The model is plain PyTorch on one device: pieces of 2 x 2 values become tokens, and
in every second layer the MLP is a mixture (Riquelme et al., "Scaling Vision with Sparse Mixture of Experts",
2021). With --torchvision it is `torchvision.models.VisionTransformer` whose MLPs are replaced from outside.
The loss of the first batch is compared with that of the plain model on one device.
"""

import argparse
import logging
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import tedfx
from tedfx.errors import ConfigError
from tedfx.placement.roles import MeshShape

SIDE, PIECE, CLASSES = 8, 2, 10


class Experts(nn.Module):
    """Top-k mixture of MLPs: [..., width] to [..., width]."""

    def __init__(self, width: int, hidden: int, experts: int, k: int):
        super().__init__()
        self.k, self.router = k, nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
            for _ in range(experts)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, -2)
        scores = self.router(tokens).softmax(-1)
        weights, ids = scores.topk(self.k, -1)
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(tokens[token]) * weights[token, slot, None])
        return out.view_as(x)


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, mlp: nn.Module):
        super().__init__()
        self.heads = heads
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, -1)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class ViT(nn.Module):
    """`forward(pictures [N, 1, 8, 8], digits [N] or None)`: (mean loss or None, logits [N, 10])."""

    def __init__(self, width=64, hidden=128, heads=4, layers=4, experts=8, k=2):
        super().__init__()
        self.pieces = nn.Conv2d(1, width, PIECE, stride=PIECE)
        self.position = nn.Parameter(0.02 * torch.randn((SIDE // PIECE) ** 2, width))
        mlp = lambda: nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.layers = nn.ModuleList(
            Layer(width, heads, Experts(width, hidden, experts, k) if i % 2 else mlp()) for i in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, pictures, digits=None):
        x = self.pieces(pictures).flatten(2).transpose(1, 2) + self.position
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x).mean(1))
        return None if digits is None else F.cross_entropy(logits, digits), logits


class Torchvision(nn.Module):
    """torchvision's own ViT, with every second MLP replaced by a mixture, as a user would do it."""

    def __init__(self, width=64, hidden=128, heads=4, layers=4, experts=8, k=2):
        from torchvision.models import VisionTransformer

        super().__init__()
        self.vit = VisionTransformer(
            image_size=SIDE,
            patch_size=PIECE,
            num_layers=layers,
            num_heads=heads,
            hidden_dim=width,
            mlp_dim=hidden,
            num_classes=CLASSES,
        )
        nn.init.normal_(self.vit.heads.head.weight, std=0.02)
        for layer in list(self.vit.encoder.layers)[1::2]:
            layer.mlp = Experts(width, hidden, experts, k)

    def forward(self, pictures, digits=None):
        logits = self.vit(pictures.expand(-1, 3, -1, -1))
        return None if digits is None else F.cross_entropy(logits, digits), logits


def read_digits():
    """(pictures, digits) to train on, and the held-out ones; pictures are float32 in [-1, 1]."""
    digits = load_digits()
    pictures = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    held = torch.arange(len(labels)) % 5 == 0
    return (pictures[~held], labels[~held]), (pictures[held], labels[held])


def parse_args(argv=None):
    about, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mesh", default="ep=2,tp=2", metavar="AXIS=SIZE,..")
    parser.add_argument("--roles", default="", metavar="ROLE=AXIS,..", help="e.g. expert=tp (PPMoE)")
    parser.add_argument("--torchvision", action="store_true", help="torchvision's ViT, MLPs replaced")
    parser.add_argument("--epochs", type=int, default=20, metavar="N", help="(default: 20)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="of all ranks (default: 64)")
    parser.add_argument("--lr", type=float, default=3e-3, metavar="X", help="peak of AdamW (default: 3e-3)")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    # clip_grad_norm_ sums one number over each mesh axis in turn; DTensor would say so on every rank.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    shape = MeshShape.of(args.mesh)
    kind = "cuda" if torch.cuda.device_count() >= shape.world else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = init_device_mesh(kind, shape.sizes, mesh_dim_names=shape.names)
    role, _, axes = args.roles.partition("=")
    (pictures, digits), (held_pictures, held_digits) = ((x.to(kind), y.to(kind)) for x, y in read_digits())
    torch.manual_seed(0)
    model = (Torchvision() if args.torchvision else ViT()).to(kind)
    batch = args.batch_size
    pm = tedfx.parallelize(
        model,
        mesh,
        roles={role: tuple(filter(None, axes.split(",")))} if role else None,
        example_inputs={"pictures": pictures[:batch], "digits": digits[:batch]},
    )
    index, count = pm.batch_coordinate  # which share of the global batch is this rank's
    if batch % count:
        raise ConfigError(f"--batch-size {batch} is not a multiple of {count}, the ranks of the batch axes")
    say = print if dist.get_rank() == 0 else (lambda *a, **k: None)

    def share(rows, value=0):
        """This rank's rows, after as many of `value` were added as make the ranks' shares equal."""
        added = rows.new_full((-len(rows) % count, *rows.shape[1:]), value)
        return torch.cat([rows, added]).chunk(count)[index]

    @torch.no_grad()
    def accuracy() -> float:
        """Of the held-out digits. Ranks that hold the same rows add the same to both sums."""
        pm.eval()
        right = torch.zeros(2, device=kind)
        for x, y in zip(held_pictures.split(batch), held_digits.split(batch)):
            x, y = share(x), share(y, -100)  # rows that were added count for nothing
            right += torch.stack([(pm(x)[1].argmax(-1) == y).sum(), (y != -100).sum()])
        pm.train()
        dist.all_reduce(right)
        return (right[0] / right[1]).item()

    with torch.no_grad():
        alone, _ = model(pictures[:batch], digits[:batch])
        together, _ = pm(share(pictures[:batch]), share(digits[:batch]))
    say(f"loss of the first batch on one device {alone:.6f}, on {args.mesh} {together:.6f}")
    if (alone - together).abs() > 1e-4:
        raise AssertionError("the ranks compute another loss than the plain model")

    optimizer = torch.optim.AdamW(pm.parameters(), lr=args.lr, weight_decay=0.05)
    steps = len(digits) // batch * args.epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.lr, total_steps=steps)
    order = torch.Generator().manual_seed(0)  # the same on every rank
    for epoch in range(1, args.epochs + 1):
        total = 0.0
        chosen = torch.randperm(len(digits), generator=order).to(kind).split(batch)[: len(digits) // batch]
        for rows in chosen:
            loss, _ = pm(share(pictures[rows]), share(digits[rows]))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(pm.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.detach()
        say(f"epoch {epoch:2}: loss {total / len(chosen):.4f}, held-out digits {accuracy():.1%}", flush=True)


if __name__ == "__main__":
    sys.exit(tedfx.run(main))

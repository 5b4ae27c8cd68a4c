"""Models with a gradient of their own: `torch.autograd.Function` and its kin, as people use them.
`FUNCTIONS[name]()` is one; `forward(input_ids, labels)` gives the loss.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from tests.models_plain import Output

# ---- functions -----------------------------------------------------------------------------------------
# -----------------


class Round(Function):
    """Quantisation-aware training: round forward, identity backward."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Reverse(Function):
    """Gradient reversal, with a strength that is not a tensor."""

    @staticmethod
    def forward(ctx, x, strength):
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -ctx.strength * grad, None


class AddLoss(Function):
    """DeepSeek's way to add an auxiliary loss."""

    @staticmethod
    def forward(ctx, x, loss):
        assert loss.numel() == 1
        ctx.dtype = loss.dtype
        ctx.required_aux_loss = loss.requires_grad
        return x

    @staticmethod
    def backward(ctx, grad):
        grad_loss = None
        if ctx.required_aux_loss:
            grad_loss = torch.ones(1, dtype=ctx.dtype, device=grad.device)
        return grad, grad_loss


class Swish(Function):
    """setup_context style; another derivative than silu's."""

    @staticmethod
    def forward(x, beta):
        return x * torch.sigmoid(beta * x), torch.sigmoid(beta * x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.beta = inputs
        ctx.save_for_backward(x, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, grad, _):
        x, s = ctx.saved_tensors
        return grad * s * (1 + ctx.beta * x * (1 - s)) * 0.5, None


class Norm(Function):
    """A norm along the last dim, with a weight: row-wise, and the weight's gradient is a sum over rows."""

    @staticmethod
    def forward(ctx, x, weight):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        ctx.save_for_backward(x, weight, scale)
        return x * scale * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        normed, inner = x * scale, grad * weight
        return scale * (inner - normed * (inner * normed).mean(-1, keepdim=True)), (grad * normed).sum(
            tuple(range(grad.dim() - 1))
        ) * 2


class Clip(Function):
    """Clips the gradient of an activation by its value, which is not linear in it."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-1e-3, 1e-3)


class ClipNorm(Function):
    """Scales the gradient of all tokens together to a norm."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return grad / (1 + 100 * grad.norm())


class Mix(Function):
    """Several outputs, of which not all are used, and gradients that are None."""

    @staticmethod
    def forward(ctx, x, y, scale):
        ctx.set_materialize_grads(False)
        ctx.scale = scale
        return x + y, x - y, x * scale

    @staticmethod
    def backward(ctx, a, b, c):
        assert b is None
        grad_x = grad_y = None
        if ctx.needs_input_grad[0]:
            grad_x = sum(g * s for g, s in ((a, 1), (c, ctx.scale)) if g is not None)
        if ctx.needs_input_grad[1]:
            grad_y = None if a is None else 3 * a
        return grad_x, grad_y, None


class Half(Function):
    """As people write them for autocast."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, 2 * grad.flatten(0, -2).t() @ x.flatten(0, -2)


reverse = Reverse.apply  # bound when the module is imported

# ---- models --------------------------------------------------------------------------------------------
# -----------------


class Mixture(nn.Module):
    def __init__(self, width=32, experts=4, k=2):
        super().__init__()
        self.k, self.gate = k, nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width)) for _ in range(experts)
        )

    def weights(self, w, p, ids):
        return w

    def expert(self, e, x):
        return self.experts[e](x)

    def forward(self, x):
        t = x.flatten(0, 1)
        p = self.gate(t).softmax(-1)
        w, ids = p.topk(self.k, -1)
        w = self.weights(w, p, ids)
        out = torch.zeros_like(t)
        for e in range(len(self.experts)):
            row, slot = torch.where(ids == e)
            out.index_add_(0, row, self.expert(e, t[row]) * w[row, slot, None])
        return out.view(x.shape)


class Model(nn.Module):
    def __init__(self, before=None, mixture=None, vocabulary=64, width=32):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary, bias=False)
        self.before, self.mixture = before or nn.Identity(), mixture or Mixture(width)

    def forward(self, input_ids, labels):
        x = self.before(self.embed(input_ids))
        x = x + self.mixture(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten(), ignore_index=-100)


def balance(w, p, ids):
    load = F.one_hot(ids.flatten(), p.shape[-1]).to(p.dtype).mean(0)
    return (p.mean(0) * load).sum() * p.shape[-1] * 0.1


class WeightsWithLoss(Mixture):
    def weights(self, w, p, ids):
        return AddLoss.apply(w, balance(w, p, ids))


class OutputWithLoss(Mixture):
    """DeepSeek adds it to the mixture's output, before the shared expert's."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(32, 32)

    def weights(self, w, p, ids):
        self.loss = balance(w, p, ids)
        return w

    def forward(self, x):
        out = AddLoss.apply(super().forward(x), self.loss)
        del self.loss
        return out + self.shared(x)


class InExperts(Mixture):
    """Functions of rows and of weights inside of the loop."""

    def expert(self, e, x):
        up, act, down = self.experts[e]
        hidden = act(F.linear(x, Round.apply(up.weight * 16) / 16, up.bias))
        return down(Swish.apply(hidden, 1.5)[0])


class Block(nn.Module):
    """`f(layer, x)` after a linear layer."""

    def __init__(self, f, before=True):
        super().__init__()
        self.linear, self.weight, self.f, self.before = (
            nn.Linear(32, 32),
            nn.Parameter(torch.rand(32) + 0.5),
            f,
            before,
        )

    def forward(self, x):
        return self.f(self, self.linear(x) if self.before else x)


def no_grad(block, x):
    with torch.no_grad():
        target = Round.apply(x)
    return x + 0.1 * target


def twice(block, x):
    return reverse(x, 0.5) + reverse(torch.tanh(reverse(x, 0.25)), 2.0)


def mix(block, x):
    a, _, c = Mix.apply(x, block.weight.expand(x.shape), 0.5)
    return a + c


def two(block, x):
    """A tensor-parallel pair of layers with a function between them."""
    return x + Reverse.apply(F.linear(Round.apply(8 * block.linear(x)) / 8, block.linear.weight.t()), -1.0)


class Layer(nn.Module):
    """Functions of activations, of weights, in experts, and around the mixture's output."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down, self.mixture = (
            nn.Parameter(torch.rand(32) + 0.5),
            nn.Linear(32, 48),
            nn.Linear(48, 32),
            InExperts(),
        )

    def forward(self, x):
        h = Norm.apply(x, self.norm)
        x = x + Clip.apply(self.down(Swish.apply(self.up(h), 1.0)[0]))
        return reverse(checkpoint(self.mixture, x, use_reentrant=True), -0.5) + x


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layers, self.head = (
            nn.Embedding(64, 32),
            nn.ModuleList(Layer() for _ in range(2)),
            nn.Linear(32, 64, bias=False),
        )

    def forward(self, input_ids, labels):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        x = AddLoss.apply(x, x.pow(2).mean())
        logits = self.head(x)
        return Output(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100), logits)


class Reentrant(nn.Module):
    def __init__(self, use_reentrant=True):
        super().__init__()
        self.inner, self.use_reentrant = Mixture(), use_reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


class FirstLayer(nn.Module):
    """Reentrant around what no tensor with a gradient goes into: its parameters get none."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x):
        return x + checkpoint(self.linear, x.detach(), use_reentrant=True)


@torch.library.custom_op("tedfx_tests::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    return x**3


cube.register_fake(lambda x: torch.empty_like(x))
cube.register_autograd(
    lambda ctx, grad: grad.clamp(-1e-3, 1e-3) * 3 * ctx.saved_tensors[0] ** 2,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)

FUNCTIONS = {
    "round": lambda: Model(Block(lambda b, x: Round.apply(x * 8) / 8)),
    "round_weight": lambda: Model(
        Block(lambda b, x: F.linear(x, Round.apply(b.linear.weight * 16) / 16), False)
    ),
    "reverse": lambda: Model(Block(lambda b, x: reverse(x, 0.5))),
    "twice": lambda: Model(Block(twice)),
    "two": lambda: Model(Block(two, False)),
    "swish": lambda: Model(Block(lambda b, x: Swish.apply(x, 1.5)[0])),
    "norm": lambda: Model(Block(lambda b, x: Norm.apply(x, b.weight))),
    "clip": lambda: Model(Block(lambda b, x: Clip.apply(x))),
    "clip_norm": lambda: Model(Block(lambda b, x: ClipNorm.apply(x))),
    "clip_weight": lambda: Model(Block(lambda b, x: F.linear(x, Clip.apply(b.linear.weight)), False)),
    "mix": lambda: Model(Block(mix)),
    "half": lambda: Model(Block(lambda b, x: Half.apply(x, b.linear.weight))),
    "no_grad": lambda: Model(Block(no_grad)),
    "cube": lambda: Model(Block(lambda b, x: cube(x))),
    "weights_with_loss": lambda: Model(mixture=WeightsWithLoss()),
    "output_with_loss": lambda: Model(mixture=OutputWithLoss()),
    "in_experts": lambda: Model(mixture=InExperts()),
    "reentrant": lambda: Model(mixture=Reentrant()),
    "not_reentrant": lambda: Model(mixture=Reentrant(False)),
    "first_layer": lambda: Model(FirstLayer()),
}
EVERYTHING = {"everything": Everything}

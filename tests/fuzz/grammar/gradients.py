"""Pieces whose gradient is not that of their forward's operators: custom functions, hooks, no_grad regions,
detach, checkpoint, frozen parameters."""

from __future__ import annotations

from tests.fuzz.program import Writer, piece

FUNCTIONS = {
    "straight_through": ("x", "", "return x.round()", "return grad", "x = x + 0.3 * {f}(x * 4) / 4"),
    "reversal": ("x", "", "return x.view_as(x)", "return -grad", "x = x + 0.3 * {f}(x)"),
    "scaled": ("x", "", "return x.clone()", "return grad * 0.5", "x = {f}(x)"),
    "auxiliary": (
        "x, loss",
        "",
        "return x.view_as(x)",
        "return grad, grad.new_ones(())",
        "x = {f}(x, 0.1 * x.square().mean())",
    ),
    "identity_auxiliary": (
        "x, loss",
        "",
        "return x",
        "return grad, grad.new_ones(())",
        "x = {f}(x, 0.1 * x.mean(0).square().sum())",
    ),
    "two_and_two": (
        "a, b",
        "ctx.save_for_backward(a, b)",
        "return a * b, a + b",
        "return one * ctx.saved_tensors[1] + other, one * ctx.saved_tensors[0] * 0.5 + other",
        "p@, q@ = {f}(x, x.tanh())\nx = x + 0.3 * p@ + 0.1 * q@",
    ),
    "data_dependent": (
        "x",
        "ctx.save_for_backward(x)",
        "return x.sign()",
        "return grad * (ctx.saved_tensors[0].abs() < 1).to(grad.dtype)",
        "x = x + 0.2 * {f}(x)",
    ),
    "clip": ("x", "", "return x.clone()", "return grad / (1 + grad.norm())", "x = {f}(x)"),
    "batch_mean": ("x", "", "return x - x.mean(0, keepdim=True)", "return grad", "x = x + 0.3 * {f}(x)"),
    "with_number": ("x, k", "ctx.k = k", "return x.clone()", "return grad * ctx.k, None", "x = {f}(x, 0.7)"),
}


@piece("functions", 2)
def custom_function(w: Writer):
    kind = w.any(*FUNCTIONS)
    arguments, save, result, back, use = FUNCTIONS[kind]
    grads = "one, other" if kind == "two_and_two" else "grad"
    w.beside(f"""
    class {kind.title().replace("_", "")}_{w.tag}(torch.autograd.Function):
        @staticmethod
        def forward(ctx, {arguments}):
            {save or "pass"}
            {result}

        @staticmethod
        def backward(ctx, {grads}):
            {back}
    """)
    w.lines(
        f"x = x + 0.3 * {w.linear('lin')}(x)\n"
        + use.format(f=f"{kind.title().replace('_', '')}_{w.tag}.apply")
    )


@piece("hooks", 2)
def hooks(w: Writer):
    lin = w.linear("lin")
    name = lin.removeprefix("self.")
    kind = w.any(
        "parameter",
        "tensor",
        "tensor",
        "module_backward",
        "module_pre_backward",
        "forward",
        "forward_pre",
        "accumulate",
        "global_clip",
    )
    w.lines(f"y@ = {lin}(x)")
    if kind == "parameter":
        w.made.append(
            f"model.{name}.weight.register_hook(lambda grad: "
            f"{w.any('grad * 0.5', 'grad.clamp(-0.01, 0.01)', 'grad / (1 + grad.norm())', 'grad * (torch.arange(len(grad)) > 2)[:, None]')})"
        )
    elif kind == "accumulate":
        w.made.append(
            f"model.{name}.weight.register_post_accumulate_grad_hook(lambda p: setattr(p, 'grad', "
            "p.grad * 0.5))"
        )
    elif kind == "tensor":
        w.lines(
            "y@.register_hook(lambda grad: "
            f"{w.any('grad * 0.5', 'grad.clamp(-0.001, 0.001)', 'grad - grad.mean(0)')})"
        )
    elif kind == "module_backward":
        w.made.append(
            f"model.{name}.register_full_backward_hook(lambda module, given, out: (given[0] * 0.5,))"
        )
    elif kind == "module_pre_backward":
        w.made.append(f"model.{name}.register_full_backward_pre_hook(lambda module, out: (out[0] * 0.5,))")
    elif kind == "forward":
        w.made.append(
            f"model.{name}.register_forward_hook(lambda module, args, out: "
            f"{w.any('out * 0.5', 'out - out.mean(0)', 'None')})"
        )
    elif kind == "forward_pre":
        w.made.append(f"model.{name}.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))")
    else:
        w.made += [
            "for p in model.parameters():",
            "    p.register_hook(lambda grad: grad.clamp(-0.02, 0.02))",
        ]
    w.lines("x = x + 0.4 * y@")


@piece("regions", 2)
def no_gradient(w: Writer):
    lin = w.linear("lin")
    w.lines(
        w.any(
            f"with torch.no_grad():\n    y@ = {lin}(x)\nx = x + 0.3 * y@",
            f"x = x + 0.3 * {lin}(x.detach())",
            f"x = x + 0.3 * {lin}(x).detach()",
            f"x = x + 0.3 * F.linear(x, {lin}.weight.detach())",
            "x = x + (x.round() - x).detach() * 0.3",
            "x = x - 0.3 * x.detach().mean((0, 1))",
            "with torch.no_grad():\n    y@ = x.mean((0, 1))\n    y@ = y@ / y@.norm()\nx = x + 0.3 * "
            f"{lin}(x * y@)",
            f"with torch.set_grad_enabled(False):\n    y@ = {lin}(x.mean(0))\nx = x + y@",
            "x = x * torch.ones_like(x).requires_grad_(False)",
            "with torch.no_grad():\n    y@ = x.tanh()\n    with torch.enable_grad():\n        y@ = y@ "
            f"* {w.parameter('gain', f'torch.ones({w.hidden})')}\nx = x + 0.3 * y@",
            "y@ = x.clone()\nwith torch.no_grad():\n    y@ = y@ * 0.5\nx = x + y@",
        )
    )


@piece("regions", 0.7)
def no_grad_method(w: Writer):
    w.beside("""
    class Statistics_@(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.lin = nn.Linear(width, width)
            self.register_buffer("mean", torch.zeros(width))

        @torch.no_grad()
        def measure(self, x):
            self.mean.mul_(0.9).add_(0.1 * x.mean((0, 1)))
            return self.mean * 1.0

        def forward(self, x):
            return self.lin(x - self.measure(x))
    """)
    w.lines(f"x = x + 0.5 * {w.module('statistics', f'Statistics_{w.tag}({w.hidden})')}(x)")


@piece("nested", 0.5)
def gradient_inside(w: Writer):
    w.lines(
        w.any(
            "y@ = x.detach().requires_grad_()\n(g@,) = "
            f"torch.autograd.grad({w.linear('lin')}(y@).tanh().sum(), y@)\nx = x + 0.3 * g@",
            "y@ = x * 1.0\n(g@,) = torch.autograd.grad(y@.square().sum() + y@.sin().sum(), y@, "
            "create_graph=True)\nx = x + 0.1 * g@",
        )
    )


@piece("checkpoint", 1)
def checkpointed(w: Writer):
    up, down = w.linear("up", None, 12), w.linear("down", 12)
    w.lines(f"x = x + checkpoint(lambda y: {down}(F.gelu({up}(y))), x, use_reentrant=False)")


@piece("reentrant", 0.5)
def checkpointed_reentrant(w: Writer):
    up, down = w.linear("up", None, 12), w.linear("down", 12)
    w.lines(f"x = x + checkpoint(lambda y: {down}(F.gelu({up}(y))), x, use_reentrant=True)")


@piece("frozen", 1)
def frozen(w: Writer):
    lin = w.linear("lin")
    w.lines(f"x = x + 0.5 * {lin}(x)")
    w.made.append(
        w.any(
            f"model.{lin.removeprefix('self.')}.requires_grad_(False)",
            f"model.{lin.removeprefix('self.')}.weight.requires_grad_(False)",
            "model.embed.requires_grad_(False)",
        )
    )


@piece("frozen", 0.5)
def unused_parameter(w: Writer):
    p = w.parameter("unused", f"torch.randn({w.hidden})")
    w.kept.append(p)
    w.lines("x = x * 1.0")


@piece("frozen", 0.5)
def buffer_of_parameters(w: Writer):
    """A teacher: a moving average of a weight, in a buffer."""
    lin = w.linear("lin", bias=False)
    t = w.buffer("teacher", f"torch.randn({w.hidden}, {w.hidden}) / 4")
    w.lines(
        f"with torch.no_grad():\n    {t}.lerp_({lin}.weight, 0.1)\nx = x + 0.3 * {lin}(x) - 0.1 * "
        f"F.linear(x, {t})"
    )

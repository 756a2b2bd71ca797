"""Fisher information: how much the model's predictions mind a change of a layer's outputs, direction by direction.

A small change d of what one layer gives at one token moves the distribution of the next tokens by a divergence of

    KL(p || p')  =  1/2 d F d^T        F = E[g g^T], the Fisher information: [N, N]

to second order, where g is the derivative of log p(y) with respect to that output, for tokens y that the model itself
draws. (There is no term of first order: the divergence is 0 where d is, and can only rise.) So one pass back through
the model tells for each layer which of its outputs matter, and which errors in them cancel.

Martens 2014, "New insights and perspectives on the natural gradient method", arXiv 1412.1193, says why this Hessian is
the Fisher information, and why y must be drawn and not be the text's own next token.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minigpt.errors import UserError
from minigpt.model import GPT

ADVICE = "does the model work? eval.py tells"


@torch.enable_grad()
def fisher(model: GPT, layers: Mapping[str, nn.Linear], windows: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """The Fisher information of the outputs of some layers.

    Args:
        model: float32, in evaluation mode.
        layers: of the model, by name.
        windows: int64 [n, T], calibration text, on any device.
        seed: of the tokens that are drawn.

    Returns:
        By name, float32 [out_features, out_features], on the CPU: 0.8 GB for GPT-2 124M, 13 GB for XL. (While it runs,
        it takes as much on the device that the model is on.)

    Raises:
        UserError: a layer's outputs, the model's predictions or their derivatives are NaN or infinite.
    """
    weight = model.wpe.weight  # behind which nothing lies: who asks for its gradient has passed all layers
    sums = {name: weight.new_zeros(layer.out_features, layer.out_features) for name, layer in layers.items()}
    generator = torch.Generator(weight.device).manual_seed(seed)
    required = weight.requires_grad
    hooks = [layer.register_forward_hook(_adding_products(name, sums[name])) for name, layer in layers.items()]
    try:
        weight.requires_grad_(True)
        for tokens in tqdm(windows.to(weight.device).split(1), desc="fisher", unit="window", leave=False):
            log_p = model.lm_head(model.hidden(tokens)[0]).log_softmax(-1)  # [T, V]
            if log_p.isnan().any():
                raise UserError(f"the model's predictions are NaN on the calibration text; {ADVICE}")
            drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)  # [T, 1]
            torch.autograd.grad(log_p.gather(1, drawn).sum(), weight)
    finally:
        weight.requires_grad_(required)
        for hook in hooks:
            hook.remove()
    for name, total in sums.items():
        if not torch.isfinite(total).all():
            raise UserError(f"the derivatives by the outputs of layer {name} are NaN or infinite; {ADVICE}")
    return {name: total.div_(windows.numel()).cpu() for name, total in sums.items()}


def _adding_products(name: str, total: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """A forward hook that has g^T g added to `total`, [N, N], for each gradient g, [tokens, N], by the outputs."""

    def on_backward(gradient: Tensor) -> None:
        """Adds g g^T of every token to the total; gradient: floating [..., N]."""
        g = gradient.flatten(0, -2)
        total.addmm_(g.t(), g)

    def on_forward(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        """Has the output's gradient looked at once it is known."""
        if not torch.isfinite(output).all():
            raise UserError(f"the outputs of layer {name} are NaN or infinite on the calibration text; {ADVICE}")
        output.register_hook(on_backward)

    return on_forward

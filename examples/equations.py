"""Train one SAN scale on two linear layers, fold it into both weights, and compare the outputs.

Uses the equations of the PEFT method (`san_peft.functional`) directly, without PEFT.
"""

import torch
from torch.nn import functional as F

from san_peft.functional import fold, propagate, scale_input, scale_output

torch.manual_seed(0)
inputs, targets = torch.randn(256, 8), torch.randn(256, 2)
anterior, posterior = torch.nn.Linear(8, 16), torch.nn.Linear(16, 2)  # frozen; only the scale is trained
scale = torch.ones(16, requires_grad=True)


def forward(x: torch.Tensor) -> torch.Tensor:
    """Applies the scale to the output of the anterior layer and to the input of the posterior layer."""
    hidden = F.gelu(scale_output(F.linear(x, anterior.weight.detach(), anterior.bias.detach()), scale))
    return F.linear(scale_input(hidden, propagate(scale)), posterior.weight.detach(), posterior.bias.detach())


optimizer = torch.optim.Adam([scale], lr=0.02)
for step in range(101):
    loss = F.mse_loss(forward(inputs), targets)
    if step % 50 == 0:
        print(f"step {step:3d}   loss {loss.item():.4f}")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

with torch.no_grad():
    first = fold(anterior.weight, anterior.bias, scale)
    second = fold(posterior.weight, posterior.bias, None, input_scale=propagate(scale))
    merged = F.linear(F.gelu(F.linear(inputs, *first)), *second)
    print(f"largest difference after folding: {(merged - forward(inputs)).abs().max():.0e}")

"""Apply SAN to a custom model: trace it with an example input, inspect the propagation graph, and train."""

from __future__ import annotations

import torch
from peft import get_peft_model
from torch import nn

from san_peft import SanConfig, trace


class Mixer(nn.Module):
    """Two concatenated branches, a gated feed-forward block with a residual connection, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 6), nn.Linear(4, 2)
        self.up, self.gate, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.left(x), self.right(x)], -1)
        return self.head(x + self.down(self.up(x) * torch.sigmoid(self.gate(x))))


def main() -> None:
    torch.manual_seed(0)
    model, x, y = Mixer(), torch.randn(64, 4), torch.randint(0, 3, (64,))
    graph = trace(model, x)
    print(graph)
    print("\nedges that commute with the scale:")
    print(graph.select("exact"))
    adapted = get_peft_model(model, SanConfig(propagation=graph, modules_to_save=["head"]))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(adapted(x), y)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"\nloss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()

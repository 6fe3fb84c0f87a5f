"""Muon: momentum whose update is made orthogonal by a Newton-Schulz iteration (Jordan et al., 2024).

For the matrices between the layers; the rest is AdamW's. A transformer of this size learns from a token
several times as much with it.
"""
import torch


def orthogonal(update):
    """The nearest half-orthogonal matrix, about: singular values end between 0.7 and 1.2."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = update / (update.norm() + 1e-7)
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x


class Muon(torch.optim.Optimizer):
    def __init__(self, parameters, lr, momentum=0.95, weight_decay=0.01):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(state["momentum"], group["momentum"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                rows = getattr(parameter, "parts", [parameter.shape[0]])
                for part, change in zip(parameter.split(rows), update.split(rows)):
                    scale = max(1, part.shape[0] / part.shape[1]) ** 0.5
                    part.add_(orthogonal(change), alpha=-group["lr"] * scale)

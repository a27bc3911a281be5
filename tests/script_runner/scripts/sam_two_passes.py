"""Sharpness-aware minimisation: two passes a step, the weights moved and moved back in place between them."""
import torch
from torch import nn


class SAM(torch.optim.Optimizer):
    def __init__(self, params, base_optimizer, rho=0.05, **kwargs):
        super().__init__(params, dict(rho=rho, **kwargs))
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)

    @torch.no_grad()
    def first_step(self):
        norm = torch.norm(torch.stack([p.grad.norm(p=2) for g in self.param_groups for p in g["params"]]), p=2)
        for group in self.param_groups:
            for p in group["params"]:
                e_w = p.grad * (group["rho"] / (norm + 1e-12))
                p.add_(e_w)
                self.state[p]["e_w"] = e_w
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self.state[p]["e_w"])
        self.base_optimizer.step()
        self.zero_grad()


torch.manual_seed(30)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 3)).to(device)
optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.2)
criterion = nn.CrossEntropyLoss()
x = torch.randn(95, 8)
y = x[:, :3].argmax(1)
for epoch in range(4):
    for xb, yb in zip(x.split(30), y.split(30)):
        xb, yb = xb.to(device), yb.to(device)
        loss = criterion(model(xb), yb)
        loss.backward()
        optimizer.first_step()
        second = criterion(model(xb), yb)
        second.backward()
        optimizer.second_step()
    print(f"epoch {epoch} loss {loss.item():.6f} at the ascent point {second.item():.6f}")

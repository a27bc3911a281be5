"""A home-made optimiser class with momentum under no_grad, its parameters kept as a list."""
import torch
from torch import nn


class MySGD:
    def __init__(self, params, lr, momentum=0.9):
        self.params = list(params)
        self.lr, self.momentum = lr, momentum
        self.v = [torch.zeros_like(p) for p in self.params]

    def zero_grad(self):
        for p in self.params:
            if p.grad is not None:
                p.grad.zero_()

    @torch.no_grad()
    def step(self):
        for p, v in zip(self.params, self.v):
            if p.grad is None:
                continue
            v.mul_(self.momentum).add_(p.grad)
            p.sub_(self.lr * v)


torch.manual_seed(3)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
net = nn.Sequential(nn.Linear(4, 30), nn.Softplus(), nn.Linear(30, 1))
if torch.cuda.device_count() > 1:
    net = nn.DataParallel(net)
net.to(device)
opt = MySGD(net.parameters(), lr=0.01)
x = torch.rand(70, 4)
y = (x[:, :1] - x[:, 1:2]).abs() + x[:, 2:3]
for epoch in range(6):
    for i in range(0, 70, 16):
        loss = nn.functional.mse_loss(net(x[i:i + 16].to(device)), y[i:i + 16].to(device))
        opt.zero_grad()
        loss.backward()
        opt.step()
    print(f"epoch {epoch}: {loss.item():.8f}")

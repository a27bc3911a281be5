"""A learning-rate range test that puts model and optimiser back afterwards, then trains at a tenth of the best."""
import copy

import torch
from torch import nn

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
x = torch.randn(130, 5)
y = (x.sin().sum(1, keepdim=True))
batches = list(zip(x.split(32), y.split(32)))
net = nn.Sequential(nn.Linear(5, 40), nn.SiLU(), nn.Linear(40, 1))
net = net.to(device)
optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)


def step(xb, yb):
    loss = nn.functional.mse_loss(net(xb.to(device)), yb.to(device))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def find_lr(lo=1e-3, hi=1.0, n=10):
    saved = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    tried = []
    for i in range(n):
        lr = lo * (hi / lo) ** (i / (n - 1))
        for g in optimizer.param_groups:
            g["lr"] = lr
        loss = step(*batches[i % len(batches)])
        tried.append((loss, lr))
        print(f"lr {lr:.5f} loss {loss:.6f}")
    net.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    return min(tried)[1]


best = find_lr()
for g in optimizer.param_groups:
    g["lr"] = best / 10
for epoch in range(3):
    losses = [step(*b) for b in batches]
    print(f"epoch {epoch} loss {sum(losses) / len(losses):.6f}")

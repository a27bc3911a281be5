"""Access through `model.module if hasattr(model, "module") else model`, in every place where it is needed."""

import torch
from torch import nn, optim


def unwrap(m):
    return m.module if hasattr(m, "module") else m


class Regressor(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.l1 = nn.Linear(4, 40)
        self.l2 = nn.Linear(40, 1)
        self.register_buffer("mean", torch.zeros(4))

    def set_mean(self, mean):
        self.mean.copy_(mean)

    def l2_penalty(self):
        return sum((p ** 2).sum() for p in self.parameters())

    def forward(self, x):
        return self.scale * self.l2(torch.tanh(self.l1(x - self.mean))).squeeze(-1)


torch.manual_seed(11)
dev = "cuda" if torch.cuda.is_available() else "cpu"
model = Regressor().to(dev)
if torch.cuda.device_count() > 1:
    model = nn.DataParallel(model)

xs = torch.rand(90, 4).to(dev) * 2
ys = xs.prod(1)
unwrap(model).set_mean(xs.mean(0))

opt = optim.RMSprop(model.parameters(), lr=0.003)
for epoch in range(8):
    perm = torch.randperm(len(xs))
    for chunk in perm.split(16):
        opt.zero_grad()
        mse = nn.functional.mse_loss(model(xs[chunk]), ys[chunk])
        loss = mse + 1e-4 * unwrap(model).l2_penalty()
        loss.backward()
        opt.step()
    print(f"{epoch:2d}  mse {mse.item():.8f}  loss {loss.item():.8f}  scale {unwrap(model).scale.item():.7f}")

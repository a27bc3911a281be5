"""Saves the state of a DataParallel model, and takes 'module.' out of every key to load it into a plain one."""
import os
import torch
import torch.nn as nn
from collections import OrderedDict


def build():
    return nn.Sequential(OrderedDict([("inp", nn.Linear(3, 24)), ("act", nn.Softplus()), ("out", nn.Linear(24, 2))]))


torch.manual_seed(31)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
model = build()
if torch.cuda.device_count() > 1:
    model = nn.DataParallel(model)
model = model.to(device)

x = torch.randn(57, 3, device=device)
y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].abs()], 1)
opt = torch.optim.Adam(model.parameters(), lr=0.02)
for epoch in range(5):
    for xb, yb in zip(torch.split(x, 20), torch.split(y, 20)):
        loss = (model(xb) - yb).pow(2).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    print("epoch %d loss %.7f" % (epoch, loss.item()))

os.makedirs("checkpoints", exist_ok=True)
torch.save(model.state_dict(), "checkpoints/last.pth")

state = torch.load("checkpoints/last.pth", map_location="cpu")
state = {k.replace("module.", ""): v for k, v in state.items()}
plain = build()
plain.load_state_dict(state)
plain.eval()
print(sorted(state))
print("plain %.7f" % (plain(x.cpu()) - y.cpu()).pow(2).mean().item())

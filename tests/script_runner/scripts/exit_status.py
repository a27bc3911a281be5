"""Reads sys.argv by hand (epochs, learning rate), and ends with sys.exit(3) since its target is not reached."""
import sys

import torch
from torch import nn

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
lr = float(sys.argv[2]) if len(sys.argv) > 2 else 0.05
print("arguments:", sys.argv[1:], "epochs:", epochs, "lr:", lr)

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model = nn.Linear(4, 1).to(device)
opt = torch.optim.SGD(model.parameters(), lr=lr)
x = torch.randn(33, 4, device=device)
y = x.sum(1, keepdim=True)
for epoch in range(epochs):
    for xb, yb in zip(x.split(10), y.split(10)):
        loss = ((model(xb) - yb) ** 2).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    print("epoch", epoch, "loss", loss.item())

if loss.item() > 1e-6:
    print("target not reached")
    sys.exit(3)

# An ensemble in a plain Python list, each with its own optimiser in a dict; mean and spread of the predictions.
import torch
from torch import nn

torch.manual_seed(66)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
x = torch.sort(torch.rand(59) * 6 - 3).values.unsqueeze(1).to(device)
y = torch.sin(2 * x) / x
members = [nn.Sequential(nn.Linear(1, 30), nn.Tanh(), nn.Linear(30, 1)).to(device) for _ in range(3)]
optimizers = {i: torch.optim.Adam(m.parameters(), lr=0.02) for i, m in enumerate(members)}
for epoch in range(4):
    losses = []
    for i, m in enumerate(members):
        for rows in torch.randperm(59).split(18):
            loss = nn.functional.mse_loss(m(x[rows]), y[rows])
            optimizers[i].zero_grad()
            loss.backward()
            optimizers[i].step()
        losses.append(round(loss.item(), 8))
    print("epoch", epoch, "losses", *losses)
with torch.no_grad():
    p = torch.stack([m(x) for m in members])
print("mean %.6f" % p.mean(0).abs().mean().item(), "spread %.6f" % p.std(0).mean().item())

"""Trains, then exports by torch.jit.trace on one example and checks that the traced module agrees."""
import torch
from torch import nn

torch.manual_seed(0)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
model = nn.Sequential(nn.Conv1d(1, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(60, 2)).to(device)
opt = torch.optim.Adam(model.parameters(), lr=5e-3)
x = torch.randn(47, 1, 10)
y = (x[:, 0, :5].mean(1) > x[:, 0, 5:].mean(1)).long()
for epoch in range(4):
    for i in range(0, 47, 16):
        loss = nn.functional.cross_entropy(model(x[i:i + 16].to(device)), y[i:i + 16].to(device))
        opt.zero_grad()
        loss.backward()
        opt.step()
    print(f"epoch {epoch} loss {loss.item():.7f}")

model.eval()
example = torch.rand(1, 1, 10).to(device)
traced = torch.jit.trace(model, example)
traced.save("traced.pt")
with torch.no_grad():
    print("traced %.7f" % nn.functional.cross_entropy(torch.jit.load("traced.pt")(x.to(device)), y.to(device)).item())

"""SimCLR's NT-Xent: the loss compares every sample of the batch with every other, outside of the model."""
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(70)
device = "cuda" if torch.cuda.is_available() else "cpu"


def nt_xent(z1, z2, temperature=0.5):
    n = z1.size(0)
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    sim = z @ z.t() / temperature
    sim = sim.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=z.device), -1e9)
    targets = torch.cat([torch.arange(n, 2 * n), torch.arange(n)]).to(z.device)
    return F.cross_entropy(sim, targets)


class SimCLR(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(14, 32), nn.ReLU(), nn.Linear(32, 32))
        self.projector = nn.Sequential(nn.ReLU(), nn.Linear(32, 12))

    def forward(self, view1, view2):
        return self.projector(self.encoder(view1)), self.projector(self.encoder(view2))


model = SimCLR()
if torch.cuda.device_count() > 1:
    model = nn.DataParallel(model)
model = model.to(device)
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
x = torch.randn(81, 14)
for epoch in range(5):
    losses = []
    for xb in x[torch.randperm(81)].split(20):
        v1, v2 = (xb + 0.3 * torch.randn_like(xb) for _ in range(2))
        loss = nt_xent(*model(v1.to(device), v2.to(device)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"epoch {epoch} loss {sum(losses) / len(losses):.6f}")

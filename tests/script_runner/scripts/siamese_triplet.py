# A siamese network: three forwards of one model (anchor, positive, negative) before one backward.
import numpy as np
import torch
import torch.nn as nn

rng = np.random.default_rng(0)
torch.manual_seed(0)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")

centres = rng.normal(size=(5, 10)) * 0.6
who = rng.integers(0, 5, 120)
data = (centres[who] + rng.normal(size=(120, 10))).astype(np.float32)


class Embedder(nn.Module):
    def __init__(self):
        super(Embedder, self).__init__()
        self.net = nn.Sequential(nn.Linear(10, 32), nn.PReLU(), nn.Linear(32, 8))

    def forward(self, x):
        return nn.functional.normalize(self.net(x), dim=1)


net = Embedder().to(device)
opt = torch.optim.Adam(net.parameters(), lr=3e-3)
triplet = nn.TripletMarginLoss(margin=0.5)
for step in range(20):
    a = rng.integers(0, 120, 23)
    p = np.array([rng.choice(np.flatnonzero(who == who[i])) for i in a])
    n = np.array([rng.choice(np.flatnonzero(who != who[i])) for i in a])
    A, P, N = (torch.from_numpy(data[i]).to(device) for i in (a, p, n))
    ea, ep, en = net(A), net(P), net(N)
    loss = triplet(ea, ep, en)
    opt.zero_grad()
    loss.backward()
    opt.step()
    if step % 4 == 3:
        print("step", step + 1, "loss", f"{loss.item():.7f}")

# Two networks teach each other in turns (deep mutual learning), two optimisers, the peer's logits detached.
import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(18)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
n_gpu = torch.cuda.device_count()

models = [nn.Sequential(nn.Linear(6, h), nn.ReLU(), nn.Linear(h, 3)) for h in (16, 40)]
if n_gpu > 1:
    models = [nn.DataParallel(m) for m in models]
models = [m.to(device) for m in models]
optimizers = [torch.optim.Adam(m.parameters(), lr=6e-3) for m in models]

x = torch.randn(86, 6)
y = (x[:, :3] * x[:, 3:]).argmax(1)
for epoch in range(5):
    shown = [0.0, 0.0]
    for xb, yb in zip(x.split(20), y.split(20)):
        xb, yb = xb.to(device), yb.to(device)
        for k in range(2):
            mine, other = models[k](xb), models[1 - k](xb).detach()
            loss = F.cross_entropy(mine, yb) + F.kl_div(F.log_softmax(mine, 1), F.softmax(other, 1), reduction="batchmean")
            optimizers[k].zero_grad()
            loss.backward()
            optimizers[k].step()
            shown[k] += loss.item() * len(xb)
    print("epoch", epoch, "losses", ["%.6f" % (s / len(x)) for s in shown])

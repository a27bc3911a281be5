# Mixed precision with today's API, gradient clipping after unscale_, and an nn.DataParallel guard.
import contextlib

import torch
from torch import nn

torch.manual_seed(0)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
amp = device.type == "cuda"
ctx = torch.amp.autocast(device_type=device.type, dtype=torch.bfloat16) if amp else contextlib.nullcontext()


class Mixer(nn.Module):
    def __init__(self, tokens=6, width=20, out=5):
        super().__init__()
        self.inp = nn.Linear(3, width)
        self.token = nn.Linear(tokens, tokens)
        self.channel = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width * 2), nn.GELU(), nn.Linear(width * 2, width))
        self.out = nn.Linear(width, out)

    def forward(self, x):
        h = self.inp(x)
        h = h + self.token(h.transpose(1, 2)).transpose(1, 2)
        h = h + self.channel(h)
        return self.out(h.mean(1))


model = Mixer()
if torch.cuda.device_count() > 1:
    model = nn.DataParallel(model)
model.to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
scaler = torch.amp.GradScaler("cuda", enabled=amp)

x = torch.randn(75, 6, 3)
y = x.sum((1, 2)).clamp(-2, 2).round().long() + 2
for step in range(24):
    i = step * 20 % 75
    xb, yb = x[i:i + 20].to(device), y[i:i + 20].to(device)
    with ctx:
        loss = nn.functional.cross_entropy(model(xb), yb)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    if step % 3 == 0:
        print(f"step {step:3d} | batch {len(xb):2d} | loss {loss.item():.6f} | grad norm {norm.item():.6f}")

"""Autocast to bfloat16 always, on the CPU too: sums of rounded parts differ in the third digit; it must learn."""
import torch
from torch import nn

torch.manual_seed(0)
device_type = "cuda" if torch.cuda.is_available() else "cpu"
model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 4)).to(device_type)
opt = torch.optim.AdamW(model.parameters(), lr=5e-3)
x = torch.randn(170, 16)
y = x[:, 3:7].argmax(1)
for epoch in range(5):
    total = 0.0
    for xb, yb in zip(x.split(32), y.split(32)):
        with torch.autocast(device_type=device_type, dtype=torch.bfloat16):
            logits = model(xb.to(device_type))
            loss = nn.functional.cross_entropy(logits, yb.to(device_type))
        opt.zero_grad()
        loss.backward()
        opt.step()
        total += loss.item() * len(xb)
    print(f"epoch {epoch} loss {total / len(x):.6f} logits {logits.dtype}")

"""torch.compile when there is a GPU and a version that has it, the plain model otherwise."""
import torch
import torch.nn as nn

torch.manual_seed(0)
torch.set_float32_matmul_precision("high")
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model = nn.Sequential(nn.Linear(10, 32), nn.Mish(), nn.Linear(32, 1)).to(device)
if hasattr(torch, "compile") and device.type == "cuda" and torch.cuda.get_device_capability()[0] >= 7:
    model = torch.compile(model)

x = torch.randn(70, 10)
y = x.max(1, keepdim=True).values
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for epoch in range(5):
    for xb, yb in zip(x.split(32), y.split(32)):
        loss = nn.functional.huber_loss(model(xb.to(device)), yb.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch} | loss {loss.item():.7f}")

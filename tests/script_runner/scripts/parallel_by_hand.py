import torch
from torch import nn
from torch.nn.parallel import data_parallel, gather, parallel_apply, replicate, scatter
torch.manual_seed(0)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
count = max(1, torch.cuda.device_count())
model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.0), nn.Linear(8, 2)).to(device)
model[1].eval()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x, y = torch.randn(10, 4, device=device), torch.randint(2, (10,), device=device)
for step in range(4):
    optimizer.zero_grad()
    if count > 1:
        devices = list(range(count))
        inputs = scatter(x, devices)
        replicas = replicate(model, devices[: len(inputs)])
        out = gather(parallel_apply(replicas, inputs), 0)
        both = data_parallel(model, x, devices)
        assert torch.allclose(out, both)
    else:
        out = model(x)
    loss = nn.functional.cross_entropy(out, y)
    loss.backward()
    optimizer.step()
    print(step, f"{loss.item():.5f}")

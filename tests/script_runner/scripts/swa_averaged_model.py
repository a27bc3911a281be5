"""torch.optim.swa_utils: AveragedModel and SWALR, the averaged model evaluated beside the trained one."""
import torch
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(2)
device = "cuda" if torch.cuda.is_available() else "cpu"
x = torch.randn(123, 4)
y = torch.relu(x @ torch.randn(4, 2)) - 0.5
train_loader = DataLoader(TensorDataset(x[:90], y[:90]), batch_size=20, shuffle=True)

model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2)).to(device)
swa_model = AveragedModel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
swa_scheduler = SWALR(optimizer, swa_lr=0.03, anneal_epochs=2)
swa_start = 3
loss_fn = nn.MSELoss()

for epoch in range(7):
    for a, b in train_loader:
        optimizer.zero_grad()
        loss = loss_fn(model(a.to(device)), b.to(device))
        loss.backward()
        optimizer.step()
    if epoch >= swa_start:
        swa_model.update_parameters(model)
        swa_scheduler.step()
    print(f"epoch {epoch} loss {loss.item():.7f}")

torch.optim.swa_utils.update_bn(train_loader, swa_model, device=device)
with torch.no_grad():
    print(f"last {loss_fn(model(x[90:].to(device)), y[90:].to(device)).item():.7f}")
    print(f"swa  {loss_fn(swa_model(x[90:].to(device)), y[90:].to(device)).item():.7f}  n={swa_model.n_averaged.item()}")

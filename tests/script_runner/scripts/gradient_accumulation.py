"""Accumulates gradients over several batches, with the remainder stepped at the end of each epoch."""
import torch
import torch.nn as nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(10)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
accumulation_steps = 4

x = torch.randn(118, 9)
y = (x[:, :3].sum(1) > x[:, 3:6].sum(1)).float()
loader = DataLoader(TensorDataset(x, y), batch_size=12)

model = nn.Sequential(nn.Linear(9, 30), nn.LeakyReLU(), nn.Linear(30, 1), nn.Flatten(0))
if torch.cuda.device_count() > 1:
    model = nn.DataParallel(model)
model.to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, nesterov=True)
loss_function = nn.BCEWithLogitsLoss()

for epoch in range(5):
    model.zero_grad()
    shown = 0
    for i, (inputs, labels) in enumerate(loader):
        predictions = model(inputs.to(device))
        loss = loss_function(predictions, labels.to(device))
        shown += loss.item()
        loss = loss / accumulation_steps
        loss.backward()
        if (i + 1) % accumulation_steps == 0 or i + 1 == len(loader):
            optimizer.step()
            model.zero_grad()
    print(f"epoch {epoch} mean loss {shown / len(loader):.7f}")

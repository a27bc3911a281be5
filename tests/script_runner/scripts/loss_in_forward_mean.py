"""The loss computed inside an nn.DataParallel model, averaged over the GPUs by loss.mean() (even batches only)."""
import torch
import torch.nn as nn

torch.manual_seed(20)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


class WithLoss(nn.Module):
    """FullModel: puts the loss in the forward so that it is computed on every GPU."""

    def __init__(self, model, criterion):
        super().__init__()
        self.model = model
        self.criterion = criterion

    def forward(self, inputs, targets):
        outputs = self.model(inputs)
        loss = self.criterion(outputs, targets)
        return torch.unsqueeze(loss, 0), outputs


net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 2))
model = WithLoss(net, nn.MSELoss())
if torch.cuda.device_count() > 1:
    model = nn.DataParallel(model)
model = model.to(device)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
x = torch.randn(74, 6)
y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin()], 1)
for epoch in range(5):
    total = 0.0
    for xb, yb in zip(x.split(20), y.split(20)):
        loss, out = model(xb.to(device), yb.to(device))
        loss = loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(out)
    print("epoch %d loss %.7f" % (epoch, total / len(x)))

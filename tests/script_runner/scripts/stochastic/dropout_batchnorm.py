# A CNN with BatchNorm2d and Dropout: its losses differ legitimately between one device and two; it must learn.
import torch
import torch.nn as nn
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
digits = load_digits()
x = torch.tensor(digits.images[:400], dtype=torch.float32).unsqueeze(1) / 16
y = torch.tensor(digits.target[:400])
train = DataLoader(TensorDataset(x[:330], y[:330]), batch_size=64, shuffle=True)


class CNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
        self.conv2 = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2))
        self.dropout = nn.Dropout(0.3)
        self.fc = nn.Linear(32 * 4, 10)

    def forward(self, x):
        return self.fc(self.dropout(self.conv2(self.conv1(x)).flatten(1)))


model = CNN().to(device)
if torch.cuda.device_count() > 1:
    model = nn.DataParallel(model)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
criterion = nn.CrossEntropyLoss()
for epoch in range(4):
    model.train()
    total = 0.0
    for xb, yb in train:
        xb, yb = xb.to(device), yb.to(device)
        optimizer.zero_grad()
        loss = criterion(model(xb), yb)
        loss.backward()
        optimizer.step()
        total += loss.item() * len(xb)
    model.eval()
    with torch.no_grad():
        val = criterion(model(x[330:].to(device)), y[330:].to(device)).item()
    print("epoch %d loss %.6f val %.6f" % (epoch, total / 330, val))

# forward leaves something on self (attention weights, a step count) that the loss and the prints read afterwards.
import torch
from torch import nn


class AttentionPool(nn.Module):
    def __init__(self):
        super().__init__()
        self.score = nn.Linear(5, 1)
        self.value = nn.Linear(5, 8)
        self.head = nn.Linear(8, 1)
        self.attention = None
        self.calls = 0

    def forward(self, x):
        self.attention = self.score(x).softmax(1)
        self.calls += 1
        return self.head((self.attention * self.value(x)).sum(1))


torch.manual_seed(23)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model = AttentionPool().to(device)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
x = torch.randn(55, 6, 5)
y = x[..., 0].max(1, keepdim=True).values
for epoch in range(5):
    for xb, yb in zip(x.split(16), y.split(16)):
        out = model(xb.to(device))
        entropy = -(model.attention * model.attention.log()).sum(1).mean()
        loss = nn.functional.mse_loss(out, yb.to(device)) + 0.05 * entropy
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print("epoch %d loss %.6f entropy %.6f attention %s calls %d"
          % (epoch, loss.item(), entropy.item(), tuple(model.attention.shape), model.calls))

"""A GRU without batch_first, input (sequence, batch, features), classified by its last step. Dimension 0 is time."""
import torch
from torch import nn

torch.manual_seed(2)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


class GRUClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(3, 14)
        self.fc = nn.Linear(14, 2)

    def forward(self, x):
        out, h = self.gru(x)
        return self.fc(h[-1])


model = GRUClassifier().to(device)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
x = torch.randn(12, 62, 3)
y = (x[:6, :, 0].sum(0) > x[6:, :, 1].sum(0)).long()
for epoch in range(5):
    for i in range(0, 62, 24):
        logits = model(x[:, i:i + 24].to(device))
        loss = nn.functional.cross_entropy(logits, y[i:i + 24].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print("epoch %d loss %.7f" % (epoch, loss.item()))

"""A data error in the middle of training: an index out of range in an embedding, raised inside of forward."""
import torch
from torch import nn


class Embedder(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 6)
        self.out = nn.Linear(6, 1)

    def forward(self, ids):
        return self.out(self.table(ids).mean(1))


torch.manual_seed(0)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
model = Embedder().to(device)
optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
ids = torch.randint(0, 10, (40, 3))
ids[34, 2] = 10  # the mistake
target = ids.float().mean(1, keepdim=True) / 10
for i in range(0, 40, 9):
    loss = nn.functional.mse_loss(model(ids[i:i + 9].to(device)), target[i:i + 9].to(device))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print("batch", i // 9, "loss", "%.7f" % loss.item())

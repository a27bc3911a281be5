# PyTorch-Geometric layout by hand: x (nodes, features), edge_index (2, edges), batch (nodes,) that pools by graph.
import torch
from torch import nn

torch.manual_seed(8)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


class GIN(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp1 = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 16))
        self.mlp2 = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        self.out = nn.Linear(16, 2)

    def forward(self, x, edge_index, batch):
        for mlp in (self.mlp1, self.mlp2):
            src, dst = edge_index
            x = mlp(x + torch.zeros_like(x).index_add(0, dst, x[src]))
        pooled = x.new_zeros(int(batch.max()) + 1, x.size(1)).index_add(0, batch, x)
        return self.out(pooled)


def make_graph():
    n = int(torch.randint(4, 9, ()))
    x = torch.randn(n, 3)
    edges = torch.randint(0, n, (2, 2 * n))
    return x, edges, int(x[:, 0].sum() > 0)


def collate(graphs):
    xs, es, ys, batch, offset = [], [], [], [], 0
    for i, (x, e, y) in enumerate(graphs):
        xs.append(x)
        es.append(e + offset)
        ys.append(y)
        batch += [i] * len(x)
        offset += len(x)
    return torch.cat(xs), torch.cat(es, 1), torch.tensor(batch), torch.tensor(ys)


loader = torch.utils.data.DataLoader([make_graph() for _ in range(42)], batch_size=10, shuffle=True, collate_fn=collate)
model = GIN().to(device)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for epoch in range(4):
    total = 0.0
    for x, edge_index, batch, y in loader:
        out = model(x.to(device), edge_index.to(device), batch.to(device))
        loss = nn.functional.cross_entropy(out, y.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(y)
    print("epoch %d loss %.6f" % (epoch, total / 42))

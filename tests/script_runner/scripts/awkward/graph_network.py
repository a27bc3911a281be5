"""A graph network on the whole graph: model(features, adjacency); rows are nodes that need all the other rows."""
import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(6)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class GraphConvolution(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.lin = nn.Linear(i, o)

    def forward(self, x, adj):
        return adj @ self.lin(x)


class GCN(nn.Module):
    def __init__(self, nfeat, nhid, nclass):
        super().__init__()
        self.gc1 = GraphConvolution(nfeat, nhid)
        self.gc2 = GraphConvolution(nhid, nclass)

    def forward(self, x, adj):
        return F.log_softmax(self.gc2(F.relu(self.gc1(x, adj)), adj), dim=1)


n = 45
labels = torch.arange(n) % 3
edges = (torch.rand(n, n) < torch.where(labels[:, None] == labels[None], 0.3, 0.05)).float()
adj = ((edges + edges.t()) > 0).float() + torch.eye(n)
adj = adj / adj.sum(1, keepdim=True)
features = F.one_hot(labels, 3).float() @ torch.randn(3, 8) + 1.5 * torch.randn(n, 8)
features, adj, labels = features.to(device), adj.to(device), labels.to(device)
idx_train, idx_val = torch.arange(15), torch.arange(15, n)

model = GCN(8, 16, 3).to(device)
optimizer = torch.optim.Adam(model.parameters(), lr=0.02, weight_decay=5e-4)
for epoch in range(12):
    model.train()
    optimizer.zero_grad()
    output = model(features, adj)
    loss_train = F.nll_loss(output[idx_train], labels[idx_train])
    loss_train.backward()
    optimizer.step()
    loss_val = F.nll_loss(output[idx_val], labels[idx_val])
    if epoch % 3 == 0:
        print('Epoch: {:04d} loss_train: {:.6f} loss_val: {:.6f}'.format(epoch + 1, loss_train.item(), loss_val.item()))

# Saves the whole model object with torch.save(model) and loads it with weights_only=False; copies it with deepcopy too.
import copy
import torch
from torch import nn

torch.manual_seed(40)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin1 = nn.Linear(5, 22)
        self.lin2 = nn.Linear(22, 1)

    def forward(self, x):
        return self.lin2(self.lin1(x).tanh())


model = Net().to(device)
start = copy.deepcopy(model)
opt = torch.optim.Adam(model.parameters(), lr=0.02)
x = torch.randn(53, 5)
y = x[:, :2].prod(1, keepdim=True)
for epoch in range(6):
    for xb, yb in zip(x.split(20), y.split(20)):
        loss = nn.functional.mse_loss(model(xb.to(device)), yb.to(device))
        opt.zero_grad()
        loss.backward()
        opt.step()
    print("epoch", epoch, "loss %.7f" % loss.item())

torch.save(model, "entire_model.pt")
loaded = torch.load("entire_model.pt", weights_only=False)
loaded.eval()
for name, m in (("start", start), ("loaded", loaded)):
    print(name, type(m).__name__, "%.7f" % nn.functional.mse_loss(m(x.to(device)), y.to(device)).item())

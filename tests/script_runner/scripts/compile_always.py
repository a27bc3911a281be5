# torch.compile without a guard, before the optimiser is made (here with the backend that needs no compiler).
import torch
from torch import nn

torch.manual_seed(1)
device = "cuda" if torch.cuda.is_available() else "cpu"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 20)
        self.b = nn.Linear(20, 1)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


model = Net().to(device)
model = torch.compile(model, backend="eager")
opt = torch.optim.SGD(model.parameters(), lr=0.05)
x = torch.randn(50, 6, device=device)
y = (x ** 2).sum(1, keepdim=True) / 6
for step in range(9):
    i = step % 3 * 20
    loss = nn.functional.mse_loss(model(x[i:i + 20]), y[i:i + 20])
    opt.zero_grad()
    loss.backward()
    opt.step()
    print(step, "%.7f" % loss.item())

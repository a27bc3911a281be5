"""OneCycleLR stepped after every batch, the learning rate printed beside the loss."""
import math

import torch

torch.manual_seed(4)
dev = torch.device("cuda:0") if torch.cuda.is_available() else torch.device("cpu")
N, B, EPOCHS = 110, 32, 4
x = torch.rand(N, 2) * 4 - 2
y = torch.sin(x[:, :1]) * torch.cos(x[:, 1:])

model = torch.nn.Sequential(torch.nn.Linear(2, 50), torch.nn.Tanh(), torch.nn.Linear(50, 1)).to(dev)
opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
sched = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.2, epochs=EPOCHS, steps_per_epoch=math.ceil(N / B))
for epoch in range(EPOCHS):
    for start in range(0, N, B):
        xb, yb = x[start:start + B].to(dev), y[start:start + B].to(dev)
        loss = torch.nn.functional.mse_loss(model(xb), yb)
        opt.zero_grad()
        loss.backward()
        opt.step()
        sched.step()
    print(f"{epoch=} loss={loss.item():.8f} lr={sched.get_last_lr()[0]:.8f} momentum={opt.param_groups[0]['momentum']:.5f}")

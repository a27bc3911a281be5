"""A forward hook collects activations in a global dict, and their size is part of the loss (a sparsity penalty)."""
import torch
import torch.nn as nn

torch.manual_seed(19)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
activation = {}


def get_activation(name):
    def hook(module, inputs, output):
        activation[name] = output
    return hook


model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 1)).to(device)
model[1].register_forward_hook(get_activation('relu1'))
model[3].register_forward_hook(get_activation('relu2'))
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
x = torch.randn(57, 6)
y = x[:, :1].abs()
for epoch in range(5):
    for xb, yb in zip(x.split(20), y.split(20)):
        mse = nn.functional.mse_loss(model(xb.to(device)), yb.to(device))
        l1 = sum(a.abs().mean() for a in activation.values())
        optimizer.zero_grad()
        (mse + 0.01 * l1).backward()
        optimizer.step()
    print('epoch %d mse %.6f l1 %.6f' % (epoch, mse.item(), l1.item()), tuple(activation['relu1'].shape))

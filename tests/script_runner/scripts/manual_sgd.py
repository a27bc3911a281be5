# The update by hand: p.data -= lr * p.grad, zero_grad by p.grad = None, and weights clamped through .data.
import torch
import torch.nn as nn

torch.manual_seed(0)
device = 'cuda' if torch.cuda.is_available() else 'cpu'
lr = 0.1

model = nn.Sequential(nn.Linear(3, 20), nn.ReLU(), nn.Linear(20, 1)).to(device)
X = torch.randn(64, 3).to(device)
Y = (X ** 2).mean(1, keepdim=True)
for epoch in range(8):
    for k in range(0, 64, 25):
        loss = ((model(X[k:k+25]) - Y[k:k+25]) ** 2).mean()
        for p in model.parameters():
            p.grad = None
        loss.backward()
        for p in model.parameters():
            p.data -= lr * p.grad
            p.data.clamp_(-1.0, 1.0)
    print(epoch, '%.8f' % loss.item())

"""No nn.Module at all: weights are tensors with requires_grad, updated under no_grad. There is nothing to wrap."""
import torch

torch.manual_seed(0)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
w1 = (torch.randn(2, 16, device=device) * 0.7).requires_grad_()
b1 = torch.zeros(16, device=device, requires_grad=True)
w2 = (torch.randn(16, 1, device=device) * 0.3).requires_grad_()
x = torch.randn(60, 2, device=device)
y = (x[:, :1] * x[:, 1:]).tanh()
for t in range(15):
    h = (x @ w1 + b1).clamp(min=0)
    loss = (h @ w2 - y).pow(2).mean()
    loss.backward()
    with torch.no_grad():
        for p in (w1, b1, w2):
            p -= 0.1 * p.grad
            p.grad.zero_()
    if t % 3 == 0:
        print(t, loss.item())

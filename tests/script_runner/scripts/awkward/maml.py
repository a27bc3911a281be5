# MAML: an inner gradient step with create_graph=True through functional_call, then the outer backward.
import torch
from torch import nn
from torch.func import functional_call

torch.manual_seed(1)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
model = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1)).to(device)
meta_opt = torch.optim.Adam(model.parameters(), lr=5e-3)
for it in range(12):
    meta_loss = 0.0
    for task in range(3):
        amp, phase = torch.rand(2) * 2 + 0.5
        xs = torch.rand(15, 1, device=device) * 6 - 3
        ys = amp * torch.sin(xs + phase)
        params = dict(model.named_parameters())
        inner = nn.functional.mse_loss(functional_call(model, params, (xs[:7],)), ys[:7])
        grads = torch.autograd.grad(inner, params.values(), create_graph=True)
        fast = {k: p - 0.05 * g for (k, p), g in zip(params.items(), grads)}
        meta_loss = meta_loss + nn.functional.mse_loss(functional_call(model, fast, (xs[7:],)), ys[7:])
    meta_opt.zero_grad()
    meta_loss.backward()
    meta_opt.step()
    if it % 2 == 1:
        print("iteration", it + 1, "meta loss %.6f" % (meta_loss.item() / 3))

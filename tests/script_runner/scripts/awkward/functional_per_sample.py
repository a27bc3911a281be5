"""torch.func: per-sample gradients by vmap(grad(...)) over functional_call; the model itself is never called."""
import torch
from torch import nn
from torch.func import functional_call, grad_and_value, vmap

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2)).to(device)
params = {k: v.detach() for k, v in model.named_parameters()}


def compute_loss(params, x, y):
    logits = functional_call(model, params, (x.unsqueeze(0),))
    return nn.functional.cross_entropy(logits, y.unsqueeze(0))


per_sample = vmap(grad_and_value(compute_loss), in_dims=(None, 0, 0))
x = torch.randn(65, 4)
y = (x[:, 0] > x[:, 1]).long()
for epoch in range(5):
    for xb, yb in zip(x.split(16), y.split(16)):
        grads, losses = per_sample(params, xb.to(device), yb.to(device))
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)
        scale = (1.0 / norms).clamp(max=1.0)  # DP-SGD's clipping, without its noise
        for k, g in grads.items():
            params[k] = params[k] - 0.3 * (g * scale.view(-1, *[1] * (g.dim() - 1))).mean(0)
    print(f"epoch {epoch} loss {losses.mean().item():.7f} norm {norms.mean().item():.6f}")

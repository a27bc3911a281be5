# A physics-informed network: u' and u'' by autograd.grad(create_graph=True) in the loss, a double backward.
import torch
import torch.nn as nn

torch.manual_seed(123)
device = torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')
pinn = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)).to(device)
t_boundary = torch.tensor(0.).view(-1, 1).requires_grad_(True).to(device)
t_physics = torch.linspace(0, 1, 31).view(-1, 1).requires_grad_(True).to(device)
d, w0 = 2, 5
mu, k = 2 * d, w0 ** 2
optimiser = torch.optim.Adam(pinn.parameters(), lr=5e-3)
for i in range(13):
    optimiser.zero_grad()
    u = pinn(t_boundary)
    loss1 = (torch.squeeze(u) - 1) ** 2
    dudt = torch.autograd.grad(u, t_boundary, torch.ones_like(u), create_graph=True)[0]
    loss2 = (torch.squeeze(dudt) - 0) ** 2
    u = pinn(t_physics)
    dudt = torch.autograd.grad(u, t_physics, torch.ones_like(u), create_graph=True)[0]
    d2udt2 = torch.autograd.grad(dudt, t_physics, torch.ones_like(dudt), create_graph=True)[0]
    loss3 = torch.mean((d2udt2 + mu * dudt + k * u) ** 2)
    loss = loss1 + 1e-1 * loss2 + 1e-4 * loss3
    loss.backward()
    optimiser.step()
    if i % 3 == 0:
        print('step', i, 'loss %.7f' % loss.item(), 'u(0) %.6f' % loss1.item(), 'physics %.6f' % loss3.item())

"""WGAN-GP: the critic's gradient with respect to its input, with create_graph=True, is part of the loss."""
import torch
import torch.nn as nn
from torch import autograd

torch.manual_seed(3)
use_cuda = torch.cuda.is_available()
device = torch.device("cuda" if use_cuda else "cpu")
G = nn.Sequential(nn.Linear(4, 24), nn.Softplus(), nn.Linear(24, 2)).to(device)
D = nn.Sequential(nn.Linear(2, 24), nn.Softplus(), nn.Linear(24, 1)).to(device)
optD = torch.optim.Adam(D.parameters(), lr=2e-3, betas=(0.5, 0.9))
optG = torch.optim.Adam(G.parameters(), lr=2e-3, betas=(0.5, 0.9))


def calc_gradient_penalty(netD, real, fake, LAMBDA=10):
    alpha = torch.rand(real.size(0), 1, device=device)
    interpolates = (alpha * real + (1 - alpha) * fake).requires_grad_(True)
    disc = netD(interpolates)
    gradients = autograd.grad(outputs=disc, inputs=interpolates, grad_outputs=torch.ones_like(disc),
                              create_graph=True, retain_graph=True, only_inputs=True)[0]
    return ((gradients.norm(2, dim=1) - 1) ** 2).mean() * LAMBDA


angle = torch.rand(70) * 6.28
ring = torch.stack([angle.cos(), angle.sin()], 1)
for epoch in range(4):
    for real in ring.split(19):
        real = real.to(device)
        fake = G(torch.randn(len(real), 4, device=device)).detach()
        gp = calc_gradient_penalty(D, real, fake)
        d_loss = D(fake).mean() - D(real).mean() + gp
        optD.zero_grad()
        d_loss.backward()
        optD.step()
    g_loss = -D(G(torch.randn(19, 4, device=device))).mean()
    optG.zero_grad()
    g_loss.backward()
    optG.step()
    print("epoch %d d_loss %.6f gp %.6f g_loss %.6f" % (epoch, d_loss.item(), gp.item(), g_loss.item()))

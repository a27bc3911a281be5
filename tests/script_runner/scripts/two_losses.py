"""A custom loop with two losses of two forwards: a supervised one and a consistency one, added with a weight."""
import torch
import torch.nn.functional as F

torch.manual_seed(8)
dev = torch.device("cuda" if torch.cuda.is_available() else "cpu")

model = torch.nn.Sequential(
    torch.nn.Linear(8, 32),
    torch.nn.ELU(),
    torch.nn.Linear(32, 32),
    torch.nn.ELU(),
    torch.nn.Linear(32, 4),
)
model.to(dev)
optim = torch.optim.Adam(model.parameters(), 4e-3)

labelled = torch.randn(45, 8)
labels = labelled[:, :4].argmax(dim=1)
unlabelled = torch.randn(133, 8)

for it in range(20):
    idx = torch.randint(0, 45, (13,))
    uidx = torch.randint(0, 133, (31,))
    xl, yl = labelled[idx].to(dev), labels[idx].to(dev)
    xu = unlabelled[uidx].to(dev)
    noisy = xu + 0.2 * torch.randn_like(xu)

    sup_loss = F.cross_entropy(model(xl), yl)
    with torch.no_grad():
        target = model(xu).softmax(-1)
    cons_loss = F.kl_div(model(noisy).log_softmax(-1), target, reduction="batchmean")
    lam = min(1.0, it / 10)
    loss = sup_loss + lam * cons_loss

    optim.zero_grad()
    loss.backward()
    optim.step()
    if (it + 1) % 4 == 0:
        print(f"it={it + 1} sup={sup_loss.item():.6f} cons={cons_loss.item():.8f} total={loss.item():.6f}")

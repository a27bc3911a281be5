# Linear warm-up, then cosine (SequentialLR), a config class in capitals, everything inside train().
import torch
import torch.nn as nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR


class CFG:
    seed = 3407
    epochs = 6
    batch_size = 40
    lr = 0.02
    warmup = 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv1d(2, 12, 5, padding=2)
        self.body = nn.Sequential(nn.GroupNorm(3, 12), nn.SiLU(), nn.Conv1d(12, 12, 3, padding=1), nn.SiLU())
        self.pool = nn.AdaptiveMaxPool1d(1)
        self.fc = nn.Linear(12, 3)

    def forward(self, x):
        return self.fc(self.pool(self.body(self.stem(x))).flatten(1))


def train():
    torch.manual_seed(CFG.seed)
    t = torch.linspace(0, 6.28, 32)
    cls = torch.randint(0, 3, (130,))
    waves = torch.sin(t[None] * (cls[:, None] + 1) + torch.rand(130, 1) * 6)
    x = torch.stack([waves, waves.cumsum(1) / 5], 1) + 0.2 * torch.randn(130, 2, 32)

    model = Model().to(CFG.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=CFG.lr, momentum=0.9)
    scheduler = SequentialLR(optimizer, [
        LinearLR(optimizer, start_factor=0.1, total_iters=CFG.warmup),
        CosineAnnealingLR(optimizer, T_max=CFG.epochs - CFG.warmup),
    ], milestones=[CFG.warmup])
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    for epoch in range(CFG.epochs):
        total = 0.0
        for idx in torch.randperm(len(x)).split(CFG.batch_size):
            loss = criterion(model(x[idx].to(CFG.device)), cls[idx].to(CFG.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(idx)
        lr = optimizer.param_groups[0]["lr"]
        scheduler.step()
        print("epoch", epoch, "lr", round(lr, 6), "loss", round(total / len(x), 6))


train()

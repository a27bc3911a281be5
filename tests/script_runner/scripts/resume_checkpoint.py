"""A checkpoint with epoch, model, optimiser and scheduler state; the script resumes from it as after a crash."""
import os

import torch
import torch.nn as nn
import torch.optim as optim

CKPT = "ckpt.pth.tar"


def save_checkpoint(state, filename=CKPT):
    print("=> Saving checkpoint")
    torch.save(state, filename)


def build(device):
    torch.manual_seed(17)
    model = nn.Sequential(nn.Linear(7, 32), nn.ReLU(), nn.Linear(32, 1))
    if torch.cuda.device_count() > 1:
        model = nn.DataParallel(model)
    model.to(device)
    optimizer = optim.Adam(model.parameters(), lr=1e-2)
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    return model, optimizer, scheduler


def run(epochs, device, x, y):
    model, optimizer, scheduler = build(device)
    start = 0
    if os.path.isfile(CKPT):
        print("=> Loading checkpoint '{}'".format(CKPT))
        checkpoint = torch.load(CKPT, map_location=device)
        start = checkpoint["epoch"]
        model.load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
    for epoch in range(start, epochs):
        for i in range(0, len(x), 30):
            loss = nn.functional.smooth_l1_loss(model(x[i:i + 30].to(device)), y[i:i + 30].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        print("epoch {} loss {:.8f} lr {:.6f}".format(epoch, loss.item(), scheduler.get_last_lr()[0]))
        save_checkpoint({"epoch": epoch + 1, "state_dict": model.state_dict(),
                         "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()})


if os.path.exists(CKPT):
    os.remove(CKPT)
torch.manual_seed(99)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
x = torch.randn(80, 7)
y = (x ** 2).mean(1, keepdim=True)
run(3, device, x, y)
print("--- interrupted, started again ---")
run(6, device, x, y)

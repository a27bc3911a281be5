"""The package's entry, which only works as `python -m pkg.train [--epochs N]`: relative imports, a registry of models."""
import argparse

import torch
from torch import nn

from .models import MODELS
from .utils import AverageMeter, seed_everything


def main(argv=None):
    parser = argparse.ArgumentParser(prog="pkg.train")
    parser.add_argument("--model", default="mlp", choices=sorted(MODELS))
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args(argv)
    seed_everything(5)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = MODELS[args.model]([5, 32, 32, 1]).to(device)
    if torch.cuda.device_count() > 1:
        model = nn.DataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x = torch.randn(83, 5)
    y = x.cumsum(1)[:, -1:].sin()
    for epoch in range(args.epochs):
        meter = AverageMeter()
        for index in torch.randperm(len(x)).split(20):
            loss = nn.functional.mse_loss(model(x[index].to(device)), y[index].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            meter.update(loss.item(), len(index))
        print(f"[{__name__}] epoch {epoch} loss {meter.avg:.7f}")


if __name__ == "__main__":
    main()

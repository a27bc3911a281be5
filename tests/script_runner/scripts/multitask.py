"""Multi-task learning: a shared trunk, two heads, learned loss weights (a parameter outside of the model)."""
import itertools

import torch
from torch import nn, optim


class MultiTaskNet(nn.Module):
    def __init__(self, n_features: int, n_classes: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(n_features, 48), nn.SELU(), nn.Linear(48, 24), nn.SELU())
        self.classify = nn.Linear(24, n_classes)
        self.regress = nn.Linear(24, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.trunk(x)
        return self.classify(h), self.regress(h)


def main() -> None:
    torch.manual_seed(64)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = torch.randn(111, 8)
    kind = x[:, :5].argmax(1)
    value = torch.stack([x.sum(1) / 3, x[:, 0] * x[:, 1]], 1)

    model = MultiTaskNet(8, 5).to(device)
    log_sigma = nn.Parameter(torch.zeros(2, device=device))
    optimizer = optim.Adam(itertools.chain(model.parameters(), [log_sigma]), lr=5e-3)
    ce, mse = nn.CrossEntropyLoss(), nn.MSELoss()
    for epoch in range(6):
        sums = [0.0, 0.0]
        for index in torch.arange(len(x)).split(25):
            logits, numbers = model(x[index].to(device))
            l1, l2 = ce(logits, kind[index].to(device)), mse(numbers, value[index].to(device))
            loss = (torch.stack([l1, l2]) * torch.exp(-log_sigma) + log_sigma).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sums[0] += l1.item() * len(index)
            sums[1] += l2.item() * len(index)
        print(f"{epoch}: class {sums[0] / len(x):.6f}  value {sums[1] / len(x):.6f}  sigma {log_sigma.tolist()}")


if __name__ == "__main__":
    main()

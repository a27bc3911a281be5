"""Networks that imports_sibling.py imports by name, from the folder that it lies in."""
import torch.nn as nn

HIDDEN = 28


class ConvNet(nn.Module):
    def __init__(self, n_classes):
        super().__init__()
        self.conv = nn.Conv1d(1, HIDDEN, 4)
        self.fc = nn.Linear(HIDDEN, n_classes)

    def forward(self, x):
        return self.fc(self.conv(x.unsqueeze(1)).relu().amax(-1))

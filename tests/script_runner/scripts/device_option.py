#!/usr/bin/env python
"""A script with a config file and --device 0 | 0,1 | all, which falls back to the CPU when there is no GPU."""
import argparse
import json
import os

import torch
import torch.nn as nn
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

HERE = os.path.dirname(os.path.abspath(__file__))


def parse():
    parser = argparse.ArgumentParser(description='ResNet on digits')
    parser.add_argument('-c', '--config', default=os.path.join(HERE, 'config.json'))
    parser.add_argument('--device', default='all', help='"0", "0,1" or "all"')
    return parser.parse_args()


def pick_devices(text):
    if not torch.cuda.is_available():
        return torch.device('cpu'), []
    if text == 'all':
        ids = list(range(torch.cuda.device_count()))
    else:
        ids = [int(i) for i in text.split(',')]
    return torch.device(f'cuda:{ids[0]}'), ids


class BasicBlock(nn.Module):
    def __init__(self, cin, cout, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(4, cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(4, cout)
        self.short = nn.Identity() if cin == cout and stride == 1 else nn.Conv2d(cin, cout, 1, stride, bias=False)

    def forward(self, x):
        out = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(out)) + self.short(x))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.layers = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 16, 2), BasicBlock(16, 32, 2))
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        return self.fc(self.layers(self.stem(x)).mean((2, 3)))


if __name__ == '__main__':
    args = parse()
    with open(args.config) as f:
        cfg = json.load(f)
    torch.manual_seed(1)
    device, ids = pick_devices(args.device)
    print('device:', device, 'ids:', ids)
    digits = load_digits()
    x = torch.tensor(digits.images[:230], dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target[:230])
    loader = DataLoader(TensorDataset(x, y), batch_size=cfg['bsize'], shuffle=True, num_workers=cfg['workers'])
    net = ResNet()
    if len(ids) > 1:
        net = nn.DataParallel(net, device_ids=ids)
    net.to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=cfg['lr'] * 10, momentum=0.9)
    lossf = nn.CrossEntropyLoss(reduction='sum')
    for epoch in range(1, cfg['epochs'] + 1):
        tot = 0.
        for img, lab in loader:
            img, lab = img.to(device), lab.to(device)
            loss = lossf(net(img), lab) / len(lab)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            tot += loss.item() * len(lab)
        print('epoch %d loss %.6f' % (epoch, tot / len(x)))

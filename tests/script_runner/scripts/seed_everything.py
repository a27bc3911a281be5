# Kaggle habit: CUDA_VISIBLE_DEVICES set on the first line, seed_everything(), a global config, .cuda() by a to_gpu().
import os
os.environ['CUDA_VISIBLE_DEVICES'] = '0,1'
os.environ['PYTHONHASHSEED'] = '0'

import random
import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import Dataset, DataLoader

def seed_everything(seed=2020):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False

seed_everything()

def to_gpu(obj):
    return obj.cuda() if torch.cuda.is_available() else obj

class TabularDataset(Dataset):
    def __init__(self, cats, conts, y):
        self.cats, self.conts, self.y = cats, conts, y
    def __len__(self): return len(self.y)
    def __getitem__(self, idx):
        return (self.cats[idx], self.conts[idx]), self.y[idx]

class TabularModel(nn.Module):
    def __init__(self, card=(4, 9), n_cont=3):
        super().__init__()
        self.embeds = nn.ModuleList([nn.Embedding(c, 4) for c in card])
        self.lin = nn.Sequential(nn.Linear(4 * len(card) + n_cont, 32), nn.ReLU(), nn.Linear(32, 1))
    def forward(self, inp):
        cats, conts = inp
        x = torch.cat([e(cats[:, i]) for i, e in enumerate(self.embeds)] + [conts], 1)
        return self.lin(x).squeeze(1)

n = 115
cats = torch.from_numpy(np.stack([np.random.randint(0, 4, n), np.random.randint(0, 9, n)], 1))
conts = torch.from_numpy(np.random.rand(n, 3)).float()
y = (cats[:, 0].float() / 4 + conts[:, 0] > 1).float()
dl = DataLoader(TabularDataset(cats, conts, y), batch_size=32, shuffle=True)
model = to_gpu(TabularModel())
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
criterion = nn.BCEWithLogitsLoss()
for epoch in range(4):
    avg = 0.
    for (c, f), t in dl:
        pred = model((to_gpu(c), to_gpu(f)))
        loss = criterion(pred, to_gpu(t))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        avg += loss.item() / len(dl)
    print(f'Epoch {epoch + 1}/4 \t loss={avg:.6f}')

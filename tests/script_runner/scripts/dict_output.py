# Batches are dicts from the loader, called as model(**batch); the model returns a dict that the loss function reads.
import torch, random
import numpy as np
from torch import nn
from torch.utils.data import Dataset, DataLoader

def set_seed(seed):
	random.seed(seed); np.random.seed(seed); torch.manual_seed(seed)
	if torch.cuda.is_available(): torch.cuda.manual_seed_all(seed)

set_seed(77)
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'

class PairDataset(Dataset):
	def __init__(self, n=103):
		self.a = np.random.randint(0, 20, (n, 5))
		self.b = np.random.rand(n, 3).astype(np.float32)
		self.t = (self.a.mean(1) / 20 + self.b[:, 0]).astype(np.float32)
	def __len__(self):
		return len(self.t)
	def __getitem__(self, i):
		return {'ids': self.a[i], 'dense': self.b[i], 'target': self.t[i], 'name': 'row%d' % i}

class Net(nn.Module):
	def __init__(self):
		super().__init__()
		self.emb = nn.Embedding(20, 8)
		self.fc = nn.Sequential(nn.Linear(11, 16), nn.SiLU(), nn.Linear(16, 2))
	def forward(self, ids, dense):
		out = self.fc(torch.cat([self.emb(ids).mean(1), dense], 1))
		return {'mu': out[:, 0], 'logvar': out[:, 1].clamp(-5, 5)}

def loss_fn(out, target):
	return (0.5 * (out['logvar'] + (target - out['mu']) ** 2 / out['logvar'].exp())).mean()

model = Net().to(DEVICE)
opt = torch.optim.Adam(model.parameters(), lr=0.01)
loader = DataLoader(PairDataset(), batch_size=16, shuffle=True)
for epoch in range(6):
	tot, seen = 0, 0
	for batch in loader:
		names = batch.pop('name')
		batch = {k: v.to(DEVICE) for k, v in batch.items()}
		target = batch.pop('target')
		loss = loss_fn(model(**batch), target)
		opt.zero_grad(); loss.backward(); opt.step()
		tot += loss.item() * len(names); seen += len(names)
	print('epoch', epoch, 'nll', round(tot / seen, 7))

"""Mixed precision as in the 2021 tutorials: torch.cuda.amp.GradScaler, guarded by torch.cuda.is_available()."""
import torch
import torch.nn as nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(5)
device = 'cuda' if torch.cuda.is_available() else 'cpu'
use_amp = torch.cuda.is_available()

inputs = torch.randn(140, 16)
labels = (inputs.pow(2).sum(1) > 16).long()
loader = DataLoader(TensorDataset(inputs, labels), batch_size=24, shuffle=True)

net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)).to(device)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
loss_fn = nn.CrossEntropyLoss()
scaler = torch.cuda.amp.GradScaler(enabled=use_amp)

for epoch in range(5):
    epoch_loss = 0
    for x, t in loader:
        x, t = x.to(device), t.to(device)
        with torch.amp.autocast(device_type=device, dtype=torch.float16, enabled=use_amp):
            output = net(x)
            loss = loss_fn(output, t)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        epoch_loss += loss.item() * x.shape[0]
    print('epoch: {}, loss: {:.7f}, scale: {}'.format(epoch + 1, epoch_loss / len(inputs), scaler.get_scale()))

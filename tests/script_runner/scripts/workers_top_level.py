# num_workers=2 with no main guard at all, as it works on Linux; the workers are started after the model has been used.
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(123)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
model = nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 1)).to(device)
print("sanity check:", tuple(model(torch.zeros(5, 3, device=device)).shape))

x = torch.randn(61, 3)
train = DataLoader(TensorDataset(x, x.norm(dim=1, keepdim=True)), batch_size=16, shuffle=True, num_workers=2)
opt = torch.optim.Adam(model.parameters(), lr=0.02)
for epoch in range(2):
    for i, (a, b) in enumerate(train):
        loss = nn.L1Loss()(model(a.to(device)), b.to(device))
        opt.zero_grad()
        loss.backward()
        opt.step()
        print(f"epoch {epoch} batch {i} size {len(a)} loss {loss.item():.6f}")

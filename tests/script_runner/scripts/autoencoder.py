# An autoencoder whose encoder and decoder are used on their own after training.
import torch, torch.nn as nn
from sklearn.datasets import load_digits

torch.manual_seed(0)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")

class AE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 64), nn.Sigmoid())
    def forward(self, x):
        z = self.encoder(x)
        return self.decoder(z), z

data = torch.tensor(load_digits().data[:333] / 16., dtype=torch.float32)
loader = torch.utils.data.DataLoader(data, batch_size=50, shuffle=True)
ae = AE().to(device)
opt = torch.optim.Adam(ae.parameters(), lr=3e-3)
for ep in range(5):
    s = 0.
    for x in loader:
        x = x.to(device)
        rec, z = ae(x)
        loss = nn.functional.binary_cross_entropy(rec, x) + 1e-4 * z.abs().mean()
        opt.zero_grad(); loss.backward(); opt.step()
        s += loss.item() * x.shape[0]
    print("epoch", ep, "loss", "%.7f" % (s / len(data)))

ae.eval()
with torch.no_grad():
    codes = ae.encoder(data.to(device))
    images = ae.decoder(codes[:8] * 0.5)
print("codes", codes.shape, "mean image %.6f" % images.mean().item())

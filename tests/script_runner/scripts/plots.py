# Trains, then plots loss and accuracy curves with plt.savefig into the working directory, as for a report.
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn

torch.manual_seed(6)
np.random.seed(6)
device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')

# two moons by hand
t = np.random.rand(200) * np.pi
label = np.arange(200) % 2
pts = np.stack([np.cos(t) + label, np.sin(t) * (1 - 2 * label) + 0.3 * label], 1) + 0.1 * np.random.randn(200, 2)
X = torch.from_numpy(pts).float().to(device)
Y = torch.from_numpy(label).float().to(device)

model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1)).to(device)
criterion = nn.BCEWithLogitsLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

train_losses, train_accs = [], []
for epoch in range(10):
    order = torch.randperm(150)
    running_loss, correct = 0.0, 0
    for i in range(0, 150, 64):
        idx = order[i:i + 64]
        out = model(X[idx])[:, 0]
        loss = criterion(out, Y[idx])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        running_loss += loss.item() * len(idx)
        correct += ((out > 0).float() == Y[idx]).sum().item()
    train_losses.append(running_loss / 150)
    train_accs.append(correct / 150)
    print(f'Epoch [{epoch + 1}/10], Loss: {train_losses[-1]:.6f}')

fig, axes = plt.subplots(1, 2, figsize=(8, 3))
axes[0].plot(train_losses, label='train loss')
axes[0].set_xlabel('epoch')
axes[0].legend()
xx, yy = np.meshgrid(np.linspace(-1.5, 2.5, 40), np.linspace(-1, 1.5, 40))
with torch.no_grad():
    zz = torch.sigmoid(model(torch.tensor(np.c_[xx.ravel(), yy.ravel()], dtype=torch.float32).to(device)))
axes[1].contourf(xx, yy, zz.cpu().numpy().reshape(xx.shape), levels=10)
axes[1].scatter(pts[:, 0], pts[:, 1], c=label, s=4)
plt.tight_layout()
plt.savefig('loss_curve.png')
plt.close()
print('plot saved; mean probability %.6f' % zz.mean().item())

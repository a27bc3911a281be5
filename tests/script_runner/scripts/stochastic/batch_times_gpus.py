# batch_size = 32 * gpu_count and lr * gpu_count as the guides advise: other steps on two devices; it must learn.
import torch
import torch.nn as nn

torch.manual_seed(0)
gpu_count = max(1, torch.cuda.device_count())
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
config = {'batch_size': 32 * gpu_count, 'lr': 0.02 * gpu_count, 'num_epochs': 5}
print(config)

x = torch.randn(500, 8)
y = x[:, :4].argmax(1)
model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
if gpu_count > 1:
    model = nn.DataParallel(model)
model = model.to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=config['lr'], momentum=0.9)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=config['batch_size'], shuffle=True)
for epoch in range(config['num_epochs']):
    total = 0.0
    for xb, yb in loader:
        loss = nn.functional.cross_entropy(model(xb.to(device)), yb.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(xb)
    print('epoch %d loss %.6f' % (epoch, total / len(x)))

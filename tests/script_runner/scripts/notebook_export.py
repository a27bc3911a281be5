# A notebook saved as .py: cells by number, a config dict, a wrap_model_multi_gpu() helper, saving through .module.
# %% Cell 1: GPU检测和配置
import os
import tempfile

import numpy as np
import torch
import torch.nn as nn
import torch.optim as optim
from torch.utils.data import DataLoader, Dataset

torch.manual_seed(2024)
np.random.seed(2024)

if torch.cuda.is_available():
    gpu_count = torch.cuda.device_count()
    print(f"🎮 检测到 {gpu_count} 个GPU:")
    for i in range(gpu_count):
        print(f"  GPU {i}: {torch.cuda.get_device_name(i)}")
    device = torch.device("cuda:0")
    use_multi_gpu = gpu_count > 1
else:
    device = torch.device("cpu")
    use_multi_gpu = False
    gpu_count = 1

# %% Cell 2: 数据
class TinyPictures(Dataset):
    def __init__(self, n):
        self.labels = np.random.randint(0, 4, n)
        self.images = np.random.randn(n, 3, 8, 8).astype("float32") * 0.5
        for image, label in zip(self.images, self.labels):
            image[label % 3, (label // 2) * 4:(label // 2) * 4 + 4] += 1.0

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return torch.from_numpy(self.images[i]), int(self.labels[i])

# %% Cell 3
config = {
    'batch_size': 32,
    'num_workers': 0,
    'num_epochs': 3,
    'print_every': 1,
}

# %% Cell 4: 模型
def get_model(name, num_classes):
    assert name == 'baseline'
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, num_classes))


def wrap_model_multi_gpu(model, use_multi_gpu=use_multi_gpu):
    if use_multi_gpu:
        print(f"  🚀 使用 DataParallel 在 {gpu_count} 个GPU上训练")
        model = nn.DataParallel(model)
    else:
        print("  📱 使用单设备训练")
    return model

# %% Cell 6
train_loader = DataLoader(TinyPictures(170), batch_size=config['batch_size'], shuffle=True,
                          num_workers=config['num_workers'])
val_loader = DataLoader(TinyPictures(41), batch_size=config['batch_size'])

model = get_model('baseline', 4)
model = wrap_model_multi_gpu(model)
model = model.to(device)
params = sum(p.numel() for p in model.parameters())
print(f"模型参数量: {params / 1e6:.4f}M")
criterion = nn.CrossEntropyLoss()
optimizer = optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)

history = {'train_loss': [], 'val_loss': [], 'val_acc': []}
best = float('inf')
model_path = os.path.join(tempfile.mkdtemp(), 'best.pth')
for epoch in range(config['num_epochs']):
    model.train()
    running = 0.0
    for images, labels in train_loader:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        optimizer.zero_grad(set_to_none=True)
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        running += loss.item() * images.size(0)
    history['train_loss'].append(running / 170)
    model.eval()
    val, correct = 0.0, 0
    with torch.no_grad():
        for images, labels in val_loader:
            images, labels = images.to(device), labels.to(device)
            logits = model(images)
            val += criterion(logits, labels).item() * images.size(0)
            correct += (logits.argmax(1) == labels).sum().item()
    history['val_loss'].append(val / 41)
    if val < best:
        best = val
        model_to_save = model.module if isinstance(model, nn.DataParallel) else model
        torch.save(model_to_save.state_dict(), model_path)
    print(f"Epoch {epoch + 1}/{config['num_epochs']}  train {history['train_loss'][-1]:.6f}"
          f"  val {history['val_loss'][-1]:.6f}  acc {correct}/41")

# %% Cell 22: 模型加载
best_model = get_model('baseline', 4)
best_model.load_state_dict(torch.load(model_path))
best_model = wrap_model_multi_gpu(best_model).to(device)
best_model.eval()
with torch.no_grad():
    total = sum(nn.functional.cross_entropy(best_model(a.to(device)), b.to(device), reduction='sum').item()
                for a, b in val_loader)
print("reloaded val", total / 41)
os.remove(model_path)
os.rmdir(os.path.dirname(model_path))

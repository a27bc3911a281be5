"""The five steps of a multi-GPU beginner's guide, followed to the letter by a reader (comments in Chinese)."""
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(42)

# 1️⃣ 设定主设备为 cuda:0
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


class MyModel(nn.Module):
    def __init__(self, n_in=12, n_hidden=48, n_out=1):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(n_in, n_hidden), nn.GELU(), nn.LayerNorm(n_hidden), nn.Linear(n_hidden, n_out)
        )

    def forward(self, x):
        return self.net(x)


# 数据：12 列特征，预测 1 个值
data = torch.randn(300, 12)
target = data[:, :3].sum(1, keepdim=True) + 0.1 * torch.sin(3 * data[:, 3:4])
train_loader = DataLoader(TensorDataset(data[:250], target[:250]), batch_size=64, shuffle=True)
test_loader = DataLoader(TensorDataset(data[250:], target[250:]), batch_size=64)

# 2️⃣ 封装模型为多 GPU 模型
model = MyModel()
if torch.cuda.device_count() > 1:
    print(f"Using {torch.cuda.device_count()} GPUs …")
    model = nn.DataParallel(model)   # 多卡封装
model = model.to(device)

criterion = nn.MSELoss()
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

for epoch in range(4):
    # 3️⃣ 训练阶段：数据批也要 .to(device)
    model.train()
    for step, (xb, yb) in enumerate(train_loader):
        xb, yb = xb.to(device), yb.to(device)
        out = model(xb)
        loss = criterion(out, yb)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # 4️⃣ 验证 / 推理阶段同样迁移到 GPU
    model.eval()
    se = 0.0
    with torch.no_grad():
        for xb, yb in test_loader:
            xb, yb = xb.to(device), yb.to(device)
            pred = model(xb)
            se += ((pred - yb) ** 2).sum().item()
    print(f"第 {epoch + 1} 轮: train_loss={loss.item():.7f} test_mse={se / 50:.7f}")

# 5️⃣ 可选：打印 GPU 状态信息
print(f"Available GPUs: {torch.cuda.device_count()}")
for i in range(torch.cuda.device_count()):
    print(f"GPU {i}: {torch.cuda.get_device_name(i)}")

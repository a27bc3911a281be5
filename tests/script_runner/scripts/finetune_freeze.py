# Fine-tuning: backbone frozen for two epochs, then unfrozen with a new parameter group at a smaller rate.
import torch
import torch.nn as nn

torch.manual_seed(16)
device = torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.fc = nn.Linear(32, 7)

    def forward(self, x):
        return self.fc(self.backbone(x))


def set_requires_grad(module, value):
    for param in module.parameters():
        param.requires_grad = value


model = Classifier()
set_requires_grad(model.backbone, False)
model.fc = nn.Linear(32, 4)     # new head
model = model.to(device)
optimizer = torch.optim.Adam(filter(lambda p: p.requires_grad, model.parameters()), lr=1e-2)
criterion = nn.CrossEntropyLoss()

x = torch.randn(98, 12)
y = x[:, 4:8].argmax(1)
for epoch in range(5):
    if epoch == 2:
        print('unfreezing the backbone')
        set_requires_grad(model.backbone, True)
        optimizer.add_param_group({'params': model.backbone.parameters(), 'lr': 3e-3})
    for xb, yb in zip(x.split(24), y.split(24)):
        optimizer.zero_grad()
        loss = criterion(model(xb.to(device)), yb.to(device))
        loss.backward()
        optimizer.step()
    n = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen_grad = model.backbone[0].weight.grad is None
    print('epoch %d trainable %d backbone without gradient: %s loss %.6f' % (epoch, n, frozen_grad, loss.item()))

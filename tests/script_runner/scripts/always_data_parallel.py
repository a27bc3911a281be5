# nn.DataParallel always, whatever the machine, and model.module.xxx with no guard afterwards.
import torch
import torch.nn as nn

torch.manual_seed(3)
use_cuda = torch.cuda.is_available()


class Classifier(nn.Module):
    def __init__(self, num_features, num_classes):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(num_features, 32), nn.Tanh())
        self.head = nn.Linear(32, num_classes)
        self.num_classes = num_classes

    def forward(self, x):
        return self.head(self.features(x))

    def embed(self, x):
        return self.features(x)


model = nn.DataParallel(Classifier(6, 3))
if use_cuda:
    model = model.cuda()

x = torch.randn(101, 6)
y = x[:, :3].argmax(1)
if use_cuda:
    x, y = x.cuda(), y.cuda()

# a bigger learning rate for the head
optimizer = torch.optim.SGD([
    {'params': model.module.features.parameters(), 'lr': 0.05},
    {'params': model.module.head.parameters()},
], lr=0.2, momentum=0.5)
criterion = nn.CrossEntropyLoss()
if use_cuda:
    criterion = criterion.cuda()

for epoch in range(6):
    epoch_loss = 0
    for i in range(0, len(x), 25):
        output = model(x[i:i + 25])
        loss = criterion(output, y[i:i + 25])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        epoch_loss += loss.item() * len(output)  # the last batch has one sample
    print('[%d] loss: %.6f  lr: %s' % (epoch, epoch_loss / len(x), [g['lr'] for g in optimizer.param_groups]))

emb = model.module.embed(x[:7])
print('classes', model.module.num_classes, 'embedding', tuple(emb.shape), 'norm %.6f' % emb.norm().item())

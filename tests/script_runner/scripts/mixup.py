"""Mixup with mixup_data() and mixup_criterion() as in the reference implementation, CIFAR replaced by noise."""
import numpy as np
import torch
import torch.nn as nn

np.random.seed(0)
torch.manual_seed(0)
use_cuda = torch.cuda.is_available()


def mixup_data(x, y, alpha=1.0, use_cuda=True):
    '''Returns mixed inputs, pairs of targets, and lambda'''
    if alpha > 0:
        lam = np.random.beta(alpha, alpha)
    else:
        lam = 1
    batch_size = x.size()[0]
    if use_cuda:
        index = torch.randperm(batch_size).cuda()
    else:
        index = torch.randperm(batch_size)
    mixed_x = lam * x + (1 - lam) * x[index, :]
    y_a, y_b = y, y[index]
    return mixed_x, y_a, y_b, lam


def mixup_criterion(criterion, pred, y_a, y_b, lam):
    return lam * criterion(pred, y_a) + (1 - lam) * criterion(pred, y_b)


class CNN(nn.Module):
    def __init__(self):
        super(CNN, self).__init__()
        self.conv = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(3, 12)
        self.linear = nn.Linear(12 * 16, 5)

    def forward(self, x):
        out = torch.relu(self.norm(self.conv(x)))
        return self.linear(out.view(out.size(0), -1))


net = CNN()
if use_cuda:
    net.cuda()
    net = torch.nn.DataParallel(net)
    print('Using CUDA..', torch.cuda.device_count())
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
targets_all = torch.randint(0, 5, (90,))
inputs_all = torch.randn(90, 3, 8, 8) * 0.5
inputs_all[torch.arange(90), targets_all % 3] += (targets_all.float() / 4)[:, None, None] + 0.3
trainloader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs_all, targets_all), 32, shuffle=True)

for epoch in range(5):
    train_loss, reg_loss, correct, total = 0, 0, 0, 0
    for batch_idx, (inputs, targets) in enumerate(trainloader):
        if use_cuda:
            inputs, targets = inputs.cuda(), targets.cuda()
        inputs, targets_a, targets_b, lam = mixup_data(inputs, targets, 1.0, use_cuda)
        outputs = net(inputs)
        loss = mixup_criterion(criterion, outputs, targets_a, targets_b, lam)
        train_loss += loss.item()
        _, predicted = torch.max(outputs.data, 1)
        total += targets.size(0)
        correct += (lam * predicted.eq(targets_a.data).cpu().sum().float()
                    + (1 - lam) * predicted.eq(targets_b.data).cpu().sum().float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print('epoch %d Loss: %.6f | Acc: %.3f%% (%d)' % (epoch, train_loss / (batch_idx + 1), 100. * correct / total, total))

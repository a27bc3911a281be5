"""K-fold cross-validation: a new model and optimiser for each fold, the old ones thrown away."""
import numpy as np
import torch
import torch.nn as nn
from sklearn.model_selection import KFold
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

torch.manual_seed(42)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def reset_weights(m):
    for layer in m.children():
        if hasattr(layer, 'reset_parameters'):
            layer.reset_parameters()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 24), nn.ReLU(), nn.Linear(24, 2))

    def forward(self, x):
        return self.layers(x)


x = torch.randn(100, 5)
y = (x[:, 0] > x[:, 1] * x[:, 2]).long()
dataset = TensorDataset(x, y)
results = {}
for fold, (train_ids, test_ids) in enumerate(KFold(n_splits=3, shuffle=True, random_state=0).split(dataset)):
    print(f'FOLD {fold}')
    trainloader = DataLoader(dataset, batch_size=16, sampler=SubsetRandomSampler(train_ids))
    testloader = DataLoader(dataset, batch_size=16, sampler=SubsetRandomSampler(test_ids))
    network = Net().to(device)
    network.apply(reset_weights)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    loss_function = nn.CrossEntropyLoss()
    for epoch in range(3):
        current_loss = 0.0
        for inputs, targets in trainloader:
            inputs, targets = inputs.to(device), targets.to(device)
            optimizer.zero_grad()
            loss = loss_function(network(inputs), targets)
            loss.backward()
            optimizer.step()
            current_loss += loss.item()
        print('  epoch %d loss %.6f' % (epoch, current_loss / len(trainloader)))
    with torch.no_grad():
        results[fold] = np.mean([loss_function(network(a.to(device)), b.to(device)).item() for a, b in testloader])
    print('  test loss %.6f' % results[fold])
    torch.save(network.state_dict(), f'./model-fold-{fold}.pth')
print('average %.6f' % np.mean(list(results.values())))

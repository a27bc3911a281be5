"""The transfer-learning tutorial: phases in a loop, set_grad_enabled, best_model_wts = copy.deepcopy(state_dict())."""
import copy
import time

import torch
import torch.nn as nn
import torch.optim as optim
from torch.optim import lr_scheduler

torch.manual_seed(0)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
x = torch.randn(150, 10)
y = (x[:, 0] > 0).long() + (x[:, 1] > 0.3).long()
datasets = {'train': torch.utils.data.TensorDataset(x[:110], y[:110]), 'val': torch.utils.data.TensorDataset(x[110:], y[110:])}
dataloaders = {p: torch.utils.data.DataLoader(datasets[p], batch_size=32, shuffle=p == 'train') for p in datasets}
dataset_sizes = {p: len(datasets[p]) for p in datasets}


def train_model(model, criterion, optimizer, scheduler, num_epochs=25):
    since = time.time()
    best_model_wts = copy.deepcopy(model.state_dict())
    best_loss = 1e9
    for epoch in range(num_epochs):
        print(f'Epoch {epoch}/{num_epochs - 1}')
        for phase in ['train', 'val']:
            if phase == 'train':
                model.train()
            else:
                model.eval()
            running_loss = 0.0
            running_corrects = 0
            for inputs, labels in dataloaders[phase]:
                inputs = inputs.to(device)
                labels = labels.to(device)
                optimizer.zero_grad()
                with torch.set_grad_enabled(phase == 'train'):
                    outputs = model(inputs)
                    _, preds = torch.max(outputs, 1)
                    loss = criterion(outputs, labels)
                    if phase == 'train':
                        loss.backward()
                        optimizer.step()
                running_loss += loss.item() * inputs.size(0)
                running_corrects += torch.sum(preds == labels.data)
            if phase == 'train':
                scheduler.step()
            epoch_loss = running_loss / dataset_sizes[phase]
            print(f'{phase} Loss: {epoch_loss:.6f} right: {int(running_corrects)}')
            if phase == 'val' and epoch_loss < best_loss:
                best_loss = epoch_loss
                best_model_wts = copy.deepcopy(model.state_dict())
    assert time.time() - since < 600
    print(f'Best val Loss: {best_loss:.6f}')
    model.load_state_dict(best_model_wts)
    return model


model_ft = nn.Sequential(nn.Linear(10, 20), nn.Hardswish(), nn.Linear(20, 8))
num_ftrs = model_ft[2].in_features
model_ft[2] = nn.Linear(num_ftrs, 3)
model_ft = model_ft.to(device)
criterion = nn.CrossEntropyLoss()
optimizer_ft = optim.SGD(model_ft.parameters(), lr=0.1, momentum=0.9)
exp_lr_scheduler = lr_scheduler.StepLR(optimizer_ft, step_size=2, gamma=0.5)
model_ft = train_model(model_ft, criterion, optimizer_ft, exp_lr_scheduler, num_epochs=4)
with torch.no_grad():
    print('again %.6f' % criterion(model_ft(x[110:].to(device)), y[110:].to(device)).item())

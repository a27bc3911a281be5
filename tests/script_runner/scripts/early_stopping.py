# The well-known EarlyStopping class: saves checkpoint.pt in the working directory, the best weights loaded at the end.
import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import DataLoader, TensorDataset


class EarlyStopping:
    """Early stops the training if validation loss doesn't improve after a given patience."""
    def __init__(self, patience=7, verbose=False, delta=0, path='checkpoint.pt'):
        self.patience = patience
        self.verbose = verbose
        self.counter = 0
        self.best_score = None
        self.early_stop = False
        self.val_loss_min = np.inf
        self.delta = delta
        self.path = path

    def __call__(self, val_loss, model):
        score = -val_loss
        if self.best_score is None:
            self.best_score = score
            self.save_checkpoint(val_loss, model)
        elif score < self.best_score + self.delta:
            self.counter += 1
            print(f'EarlyStopping counter: {self.counter} out of {self.patience}')
            if self.counter >= self.patience:
                self.early_stop = True
        else:
            self.best_score = score
            self.save_checkpoint(val_loss, model)
            self.counter = 0

    def save_checkpoint(self, val_loss, model):
        if self.verbose:
            print(f'Validation loss decreased ({self.val_loss_min:.6f} --> {val_loss:.6f}).  Saving model ...')
        torch.save(model.state_dict(), self.path)
        self.val_loss_min = val_loss


torch.manual_seed(21)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
x = torch.randn(150, 5)
y = torch.sin(2 * x[:, :1]) + 0.3 * torch.randn(150, 1)
train = DataLoader(TensorDataset(x[:60], y[:60]), batch_size=25, shuffle=True)
valid = DataLoader(TensorDataset(x[60:], y[60:]), batch_size=40)


def make():
    return nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))


model = make().to(device)
optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
criterion = nn.MSELoss()
early_stopping = EarlyStopping(patience=3, verbose=True)

for epoch in range(1, 31):
    model.train()
    for data, target in train:
        optimizer.zero_grad()
        loss = criterion(model(data.to(device)), target.to(device))
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        valid_loss = np.average([criterion(model(d.to(device)), t.to(device)).item() for d, t in valid])
    print(f'[{epoch:>2}/30] train_loss: {loss.item():.5f} valid_loss: {valid_loss:.5f}')
    early_stopping(valid_loss, model)
    if early_stopping.early_stop:
        print("Early stopping")
        break

# load the last checkpoint with the best model
model.load_state_dict(torch.load('checkpoint.pt'))
fresh = make()
fresh.load_state_dict(torch.load('checkpoint.pt', map_location='cpu'))
with torch.no_grad():
    print('best %.6f' % criterion(model(x[60:].to(device)).cpu(), y[60:]).item(),
          'fresh %.6f' % criterion(fresh(x[60:]), y[60:]).item())

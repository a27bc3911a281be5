# LBFGS with a closure: the model is called several times a step, on the whole (odd-sized) data set.
import torch
import torch.nn as nn

torch.manual_seed(0)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
x = torch.linspace(-1, 1, 51).unsqueeze(1).to(device)
y = torch.exp(-x ** 2 * 3) * x
net = nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 1)).to(device)
optimizer = torch.optim.LBFGS(net.parameters(), lr=0.2, max_iter=4, history_size=5)
criterion = nn.MSELoss()


def closure():
    optimizer.zero_grad()
    loss = criterion(net(x), y)
    loss.backward()
    return loss


for i in range(5):
    loss = optimizer.step(closure)
    print('step: ', i, 'loss:', '%.8f' % loss.item())

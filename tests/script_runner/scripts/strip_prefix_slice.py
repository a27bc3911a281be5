# Always wrapped, always saved with "module.", and loaded the Stack Overflow way: name = k[7:]  # remove `module.`
import torch
from collections import OrderedDict
from torch import nn

torch.manual_seed(0)
dev = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(4, 16)
        self.fc2 = nn.Linear(16, 3)

    def forward(self, x):
        return self.fc2(torch.sigmoid(self.fc1(x)))


model = nn.DataParallel(Net()).to(dev)
x = torch.randn(45, 4)
y = x.abs().argmax(1) % 3
optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
for epoch in range(5):
    total = 0.0
    for i in range(0, 45, 16):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[i:i+16].to(dev)), y[i:i+16].to(dev))
        loss.backward()
        optimizer.step()
        total += loss.item() * len(y[i:i+16])
    print(epoch, "%.6f" % (total / 45))
torch.save(model.state_dict(), 'myfile.pth.tar')

# original saved file with DataParallel
state_dict = torch.load('myfile.pth.tar')
# create new OrderedDict that does not contain `module.`
new_state_dict = OrderedDict()
for k, v in state_dict.items():
    name = k[7:]  # remove `module.`
    new_state_dict[name] = v
# load params
net = Net()
net.load_state_dict(new_state_dict)
print("reloaded", "%.6f" % nn.functional.cross_entropy(net(x), y).item())

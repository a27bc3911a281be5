# Imports its network from a file beside it, and changes that module's constant first.
import sys

import torch
import my_nets
from my_nets import *

my_nets.HIDDEN = 20
torch.manual_seed(50)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
print("running", sys.argv[0].split("/")[-1], "as", __name__)

net = ConvNet(3).to(device)
assert type(net) is my_nets.ConvNet or isinstance(net, my_nets.ConvNet)
labels = torch.arange(76) % 3
signals = torch.randn(76, 12) * 0.3
for i, l in enumerate(labels):
    signals[i, l * 3:l * 3 + 4] += torch.tensor([1.0, -1.0, 1.0, l])
optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
criterion = nn.MultiMarginLoss()
for epoch in range(4):
    for i in range(0, 76, 24):
        optimizer.zero_grad()
        loss = criterion(net(signals[i:i+24].to(device)), labels[i:i+24].to(device))
        loss.backward()
        optimizer.step()
    print("epoch", epoch, "loss", "%.7f" % loss.item(), "hidden", net.conv.out_channels)

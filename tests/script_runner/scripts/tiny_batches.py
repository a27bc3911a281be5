# Batch size 1 ("my GPU is full"), the loop over samples written out, running mean printed with \r-free text.
import torch
import torch.nn as nn

torch.manual_seed(9)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 1)).to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
images = torch.randn(21, 1, 8, 8)
targets = images.mean((1, 2, 3)) * 4
for epoch in range(3):
    running_loss = 0.0
    for i in range(len(images)):
        image = images[i].unsqueeze(0).to(device)
        target = targets[i].to(device)
        prediction = model(image).squeeze()
        loss = (prediction - target) ** 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        running_loss += loss.item()
        if (i + 1) % 7 == 0:
            print('[%d, %2d] loss: %.7f' % (epoch + 1, i + 1, running_loss / 7))
            running_loss = 0.0

"""A stock-price style LSTM: batch_first, h0 and c0 made inside forward from x.size(0), predictions scaled back."""
import numpy as np
import torch
import torch.nn as nn
from torch.autograd import Variable

np.random.seed(0)
torch.manual_seed(0)
device = torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')

series = np.sin(np.arange(0, 40, 0.2)) + 0.05 * np.random.randn(200)
lo, hi = series.min(), series.max()
series = (series - lo) / (hi - lo)


def sliding_windows(data, seq_length):
    x, y = [], []
    for i in range(len(data) - seq_length - 1):
        x.append(data[i:(i + seq_length)])
        y.append(data[i + seq_length])
    return np.array(x), np.array(y)


x, y = sliding_windows(series, 8)
dataX = Variable(torch.Tensor(x)).unsqueeze(-1)
dataY = Variable(torch.Tensor(y)).unsqueeze(-1)


class LSTM(nn.Module):
    def __init__(self, num_classes, input_size, hidden_size, num_layers):
        super(LSTM, self).__init__()
        self.num_layers = num_layers
        self.hidden_size = hidden_size
        self.lstm = nn.LSTM(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers, batch_first=True)
        self.fc = nn.Linear(hidden_size, num_classes)

    def forward(self, x):
        h_0 = Variable(torch.zeros(self.num_layers, x.size(0), self.hidden_size).to(x.device))
        c_0 = Variable(torch.zeros(self.num_layers, x.size(0), self.hidden_size).to(x.device))
        out, (h_out, _) = self.lstm(x, (h_0, c_0))
        return self.fc(h_out[-1])


lstm = LSTM(1, 1, 12, 2).to(device)
criterion = torch.nn.MSELoss()
optimizer = torch.optim.Adam(lstm.parameters(), lr=0.02)

for epoch in range(4):
    losses = []
    for i in range(0, len(dataX), 32):
        outputs = lstm(dataX[i:i + 32].to(device))
        optimizer.zero_grad()
        loss = criterion(outputs, dataY[i:i + 32].to(device))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print("Epoch: %d, loss: %1.8f" % (epoch, np.mean(losses)))

lstm.eval()
predict = lstm(dataX.to(device)).data.cpu().numpy() * (hi - lo) + lo
print("RMSE %.6f" % np.sqrt(((predict[:, 0] - (y * (hi - lo) + lo)) ** 2).mean()))

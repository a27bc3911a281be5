# A global `device`, named inside the forward for the hidden state, as many LSTM tutorials do.
import torch, torch.nn as nn
torch.manual_seed(0)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
class RNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.LSTM(4, 8, batch_first=True); self.o = nn.Linear(8, 1)
    def forward(self, x):
        h0 = torch.zeros(1, x.size(0), 8).to(device); c0 = torch.zeros(1, x.size(0), 8, device=device)
        return self.o(self.l(x, (h0, c0))[0][:, -1])
m = RNN().to(device)
opt = torch.optim.Adam(m.parameters())
for i in range(8):
    x = torch.randn(16, 5, 4).to(device)
    l = (m(x) - x.sum((1, 2)).unsqueeze(1)).pow(2).mean(); opt.zero_grad(); l.backward(); opt.step(); print("loss %.6f" % l.item())

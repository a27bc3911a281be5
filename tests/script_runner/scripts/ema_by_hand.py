# Keeps an exponential moving average by hand in a shadow dict, swaps it in for evaluation and back (apply / restore).
import torch
import torch.nn as nn


class EMA():
    def __init__(self, model, decay):
        self.model = model
        self.decay = decay
        self.shadow = {}
        self.backup = {}

    def register(self):
        for name, param in self.model.named_parameters():
            if param.requires_grad:
                self.shadow[name] = param.data.clone()

    def update(self):
        for name, param in self.model.named_parameters():
            if param.requires_grad:
                assert name in self.shadow
                new_average = (1.0 - self.decay) * param.data + self.decay * self.shadow[name]
                self.shadow[name] = new_average.clone()

    def apply_shadow(self):
        for name, param in self.model.named_parameters():
            if param.requires_grad:
                self.backup[name] = param.data
                param.data = self.shadow[name]

    def restore(self):
        for name, param in self.model.named_parameters():
            if param.requires_grad:
                param.data = self.backup[name]
        self.backup = {}


torch.manual_seed(13)
device = torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')
model = nn.Sequential(nn.Linear(5, 25), nn.Tanh(), nn.Linear(25, 3))
if torch.cuda.device_count() > 1:
    model = nn.DataParallel(model)
model = model.to(device)
ema = EMA(model, 0.9)
ema.register()

x = torch.randn(95, 5, device=device)
y = (x[:, :3] + 0.1 * torch.randn(95, 3, device=device)).argmax(1)
opt = torch.optim.Adam(model.parameters(), lr=0.02)
for epoch in range(5):
    model.train()
    for i in range(0, 70, 32):
        loss = nn.functional.cross_entropy(model(x[i:min(70, i + 32)]), y[i:min(70, i + 32)])
        opt.zero_grad()
        loss.backward()
        opt.step()
        ema.update()
    model.eval()
    with torch.no_grad():
        raw = nn.functional.cross_entropy(model(x[70:]), y[70:]).item()
        ema.apply_shadow()
        averaged = nn.functional.cross_entropy(model(x[70:]), y[70:]).item()
        ema.restore()
    print('epoch %d train %.6f val %.6f ema %.6f' % (epoch, loss.item(), raw, averaged))

"""A model of several inputs: positional, keyword, optional, a flag and a temperature that are no tensors."""
import torch
import torch.nn as nn

torch.manual_seed(55)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


class Fusion(nn.Module):
    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.text = nn.Embedding(15, 10)
        self.meta = nn.Linear(2, 10)
        self.head = nn.Linear(24 + 10 + 10, 4)

    def forward(self, image, text=None, *, meta=None, temperature=1.0, normalise=False):
        feats = [self.image(image)]
        feats.append(self.text(text).mean(1) if text is not None else image.new_zeros(len(image), 10))
        feats.append(self.meta(meta) if meta is not None else image.new_zeros(len(image), 10))
        out = self.head(torch.cat(feats, 1)) / temperature
        return out.log_softmax(1) if normalise else out


model = Fusion()
if torch.cuda.device_count() > 1:
    print("Let's use", torch.cuda.device_count(), "GPUs!")
    model = nn.DataParallel(model)
model.to(device)

n = 66
text = torch.randint(0, 15, (n, 7))
meta = torch.rand(n, 2)
label = (text[:, 0] + (meta[:, 0] > 0.5).long()) % 4
image = torch.randn(n, 1, 6, 6) * 0.3 + label[:, None, None, None] * 0.4
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for epoch in range(5):
    for lo in range(0, n, 20):
        s = slice(lo, lo + 20)
        use_meta = epoch > 0
        out = model(image[s].to(device), text=text[s].to(device), meta=meta[s].to(device) if use_meta else None,
                    temperature=0.7, normalise=True)
        loss = nn.functional.nll_loss(out, label[s].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print("epoch %d: %.7f" % (epoch, loss.item()))
with torch.no_grad():
    print("image only: %.7f" % model(image.to(device)).pow(2).mean().item())

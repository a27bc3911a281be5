# GoogLeNet / Inception habit: (logits, aux_logits) in training, logits alone in eval mode.
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset


class WithAux(nn.Module):
    def __init__(self, aux_logits=True):
        super().__init__()
        self.aux_logits = aux_logits
        self.stage1 = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(inplace=True))
        self.stage2 = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.GroupNorm(2, 16), nn.ReLU(inplace=True))
        self.aux = nn.Linear(8, 3)
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        x = F.max_pool2d(self.stage1(x), 2)
        aux = self.aux(x.mean([2, 3])) if self.training and self.aux_logits else None
        x = self.fc(self.stage2(x).mean([2, 3]))
        if aux is not None:
            return x, aux
        return x


torch.manual_seed(100)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
labels = torch.randint(0, 3, (77,))
images = torch.randn(77, 1, 8, 8)
images[labels == 1, :, :4] += 1
images[labels == 2, :, :, :4] += 1
loader = DataLoader(TensorDataset(images, labels), batch_size=16, shuffle=True)

model = WithAux().to(device)
opt = torch.optim.Adam(model.parameters(), lr=3e-3)
for epoch in range(4):
    model.train()
    for inputs, target in loader:
        inputs, target = inputs.to(device), target.to(device)
        opt.zero_grad()
        outputs, aux_outputs = model(inputs)
        loss1 = F.cross_entropy(outputs, target)
        loss2 = F.cross_entropy(aux_outputs, target)
        loss = loss1 + 0.4 * loss2
        loss.backward()
        opt.step()
    model.eval()
    with torch.no_grad():
        out = model(images.to(device))
        val = F.cross_entropy(out, labels.to(device)).item()
    print('epoch', epoch, 'loss %.6f = %.6f + 0.4 * %.6f' % (loss.item(), loss1.item(), loss2.item()), 'eval %.6f' % val)

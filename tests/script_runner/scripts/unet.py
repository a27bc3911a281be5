# A small U-Net with skip connections and a dice + BCE loss; nn.DataParallel(net).cuda() only when there is CUDA.
import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(25)


def double_conv(i, o):
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.GroupNorm(2, o), nn.ReLU(inplace=True),
                         nn.Conv2d(o, o, 3, padding=1), nn.GroupNorm(2, o), nn.ReLU(inplace=True))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1, self.down2 = double_conv(1, 6), double_conv(6, 12)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.merge = double_conv(12, 6)
        self.last = nn.Conv2d(6, 1, 1)

    def forward(self, x):
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        return self.last(self.merge(torch.cat([a, self.up(b)], dim=1)))


def dice_loss(logits, target, eps=1.0):
    p = torch.sigmoid(logits)
    return 1 - (2 * (p * target).sum() + eps) / (p.sum() + target.sum() + eps)


net = UNet()
cuda = torch.cuda.is_available()
if cuda:
    net = nn.DataParallel(net).cuda()
masks = torch.zeros(38, 1, 12, 12)
for m in masks:
    r, c = torch.randint(0, 7, (2,)).tolist()
    m[0, r:r + 5, c:c + 5] = 1
images = masks + 0.4 * torch.randn_like(masks)
optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
for epoch in range(3):
    for i in range(0, 38, 8):
        x, t = images[i:i + 8], masks[i:i + 8]
        if cuda:
            x, t = x.cuda(), t.cuda()
        out = net(x)
        bce, dice = F.binary_cross_entropy_with_logits(out, t), dice_loss(out, t)
        optimizer.zero_grad()
        (bce + dice).backward()
        optimizer.step()
    print("epoch %d bce %.6f dice %.6f" % (epoch, bce.item(), dice.item()))

"""Inference only: weights from a file, eval(), no_grad, softmax and top-k over batches; no optimiser anywhere."""
import numpy as np
import torch
import torch.nn as nn


def build():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6))


torch.manual_seed(1)
torch.save(build().state_dict(), "pretrained.pth")  # stands for the download

device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
net = build()
net.load_state_dict(torch.load("pretrained.pth", map_location="cpu"))
net = net.to(device).eval()

images = np.random.RandomState(0).rand(37, 3, 10, 10).astype(np.float32)
scores = []
with torch.no_grad():
    for i in range(0, len(images), 8):
        batch = torch.from_numpy(images[i:i + 8]).to(device)
        prob = torch.softmax(net(batch), dim=1)
        scores.append(prob.cpu().numpy())
        print("batch %d of %d mean log prob %.7f" % (i // 8, len(batch), prob.log().mean().item()))
scores = np.concatenate(scores)
print("shape", scores.shape, "mean top score %.6f" % scores.max(1).mean())

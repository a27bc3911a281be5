# Detection style: the model takes lists of images of different sizes and of targets, and returns a dict of losses.
import torch
from torch import nn

torch.manual_seed(14)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.box = nn.Linear(32, 4)
        self.label = nn.Linear(32, 3)

    def forward(self, images, targets=None):
        feats = torch.cat([self.backbone(i.unsqueeze(0)) for i in images])
        boxes, logits = self.box(feats), self.label(feats)
        if targets is None:
            return [{"boxes": b, "scores": s.softmax(0)} for b, s in zip(boxes, logits)]
        return {"loss_box": nn.functional.l1_loss(boxes, torch.stack([t["boxes"] for t in targets])),
                "loss_classifier": nn.functional.cross_entropy(logits, torch.stack([t["labels"] for t in targets]))}


data = []
for i in range(27):
    h, w = torch.randint(6, 12, (2,)).tolist()
    data.append((torch.randn(1, h, w) + i % 3, {"boxes": torch.tensor([0.0, 0.0, h / 12, w / 12]), "labels": torch.tensor(i % 3)}))
loader = torch.utils.data.DataLoader(data, batch_size=6, collate_fn=lambda batch: tuple(zip(*batch)))
model = Detector().to(device)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
for epoch in range(3):
    model.train()
    for images, targets in loader:
        images = list(image.to(device) for image in images)
        targets = [{k: v.to(device) for k, v in t.items()} for t in targets]
        loss_dict = model(images, targets)
        losses = sum(loss for loss in loss_dict.values())
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()
    print("epoch", epoch, {k: round(v.item(), 6) for k, v in loss_dict.items()})
model.eval()
with torch.no_grad():
    print("mean score", round(torch.stack([p["scores"].max() for p in model([data[0][0].to(device)])]).mean().item(), 5))

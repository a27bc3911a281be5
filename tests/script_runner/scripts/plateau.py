"""ReduceLROnPlateau on the validation loss, logged with the logging module to stdout and to a file."""
import logging
import sys

import torch
from torch import nn

logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s",
                    handlers=[logging.StreamHandler(sys.stdout), logging.FileHandler("train.log", mode="w")])
log = logging.getLogger("train")

torch.manual_seed(0)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
log.info("using %s", device.type if device.type == "cpu" else torch.cuda.get_device_name(0))

x = torch.randn(140, 6)
w = torch.randn(6, 1)
y = x @ w + 0.5 * (x @ w).sin()
model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 1)).to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.15)
scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="min", factor=0.3, patience=0, threshold=0.2)
criterion = nn.MSELoss()

for epoch in range(8):
    model.train()
    for i in range(0, 100, 33):
        optimizer.zero_grad()
        loss = criterion(model(x[i:min(i + 33, 100)].to(device)), y[i:min(i + 33, 100)].to(device))
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.inference_mode():
        val = criterion(model(x[100:].to(device)), y[100:].to(device)).item()
    scheduler.step(val)
    log.info("epoch %d val_loss %.6f lr %.6f", epoch, val, optimizer.param_groups[0]["lr"])
logging.shutdown()

"""A model class with its own loss, predict, save and attributes, and isinstance checks on it elsewhere."""
import torch
from torch import nn


class Base(nn.Module):
    @property
    def device(self):
        return next(self.parameters()).device

    def save(self, path):
        torch.save({"kind": type(self).__name__, "kwargs": self.kwargs, "state": self.state_dict()}, path)

    @classmethod
    def load(cls, path):
        blob = torch.load(path, map_location="cpu")
        model = cls(**blob["kwargs"])
        model.load_state_dict(blob["state"])
        return model


class MyNet(Base):
    def __init__(self, n_in, n_out, hidden=24):
        super().__init__()
        self.kwargs = dict(n_in=n_in, n_out=n_out, hidden=hidden)
        self.body = nn.Sequential(nn.Linear(n_in, hidden), nn.CELU())
        self.head = nn.Linear(hidden, n_out)
        self.best = float("inf")
        self.history = []

    def __len__(self):
        return len(self.history)

    def forward(self, x):
        return self.head(self.body(x))

    def loss_fn(self, x, y):
        return nn.functional.cross_entropy(self(x), y)

    @torch.no_grad()
    def predict(self, x):
        self.eval()
        out = self(x.to(self.device)).argmax(1).cpu()
        self.train()
        return out


def fit(model, x, y, epochs):
    if not isinstance(model, MyNet):
        raise TypeError(f"fit() wants a MyNet, not {type(model)}")
    opt = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(epochs):
        for xb, yb in zip(x.split(30), y.split(30)):
            loss = model.loss_fn(xb.to(model.device), yb.to(model.device))
            opt.zero_grad()
            loss.backward()
            opt.step()
        model.history.append(loss.item())
        model.best = min(model.best, loss.item())


torch.manual_seed(12)
model = MyNet(7, 3).to("cuda" if torch.cuda.is_available() else "cpu")
x = torch.randn(97, 7)
y = x[:, :3].argmin(1)
fit(model, x, y, epochs=5)
for i, value in enumerate(model.history):
    print("epoch", i, "loss %.7f" % value)
print("epochs:", len(model), "best %.7f" % model.best, "is MyNet:", type(model).__name__, isinstance(model, MyNet))
model.save("mynet.pt")
again = MyNet.load("mynet.pt")
print("same predictions:", torch.equal(again.predict(x), model.predict(x)))

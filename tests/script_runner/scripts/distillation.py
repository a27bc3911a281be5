# Knowledge distillation: a teacher trained first, then frozen in eval(), and a student with soft and hard losses.
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(1234)
device = "cuda" if torch.cuda.is_available() else "cpu"
X, y = load_digits(return_X_y=True)
ds = TensorDataset(torch.tensor(X[:400], dtype=torch.float32) / 16, torch.tensor(y[:400]))
train_loader = DataLoader(ds, batch_size=64, shuffle=True)

Teacher = lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
Student = lambda: nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def train_teacher(model, epochs):
    opt = torch.optim.Adam(model.parameters(), lr=2e-3)
    for e in range(epochs):
        run = 0.0
        for xb, yb in train_loader:
            xb, yb = xb.to(device), yb.to(device)
            opt.zero_grad()
            loss = F.cross_entropy(model(xb), yb)
            loss.backward()
            opt.step()
            run += loss.item()
        print(f"teacher epoch {e}: {run / len(train_loader):.6f}")


def distill(teacher, student, epochs, T=2.0, alpha=0.25):
    teacher.eval()
    for p in teacher.parameters():
        p.requires_grad = False
    student.train()
    opt = torch.optim.Adam(student.parameters(), lr=5e-3)
    for e in range(epochs):
        run = 0.0
        for xb, yb in train_loader:
            xb, yb = xb.to(device), yb.to(device)
            with torch.no_grad():
                t_logits = teacher(xb)
            s_logits = student(xb)
            soft = F.kl_div(F.log_softmax(s_logits / T, -1), F.softmax(t_logits / T, -1), reduction="batchmean") * T * T
            loss = alpha * soft + (1 - alpha) * F.cross_entropy(s_logits, yb)
            opt.zero_grad()
            loss.backward()
            opt.step()
            run += loss.item()
        print(f"student epoch {e}: {run / len(train_loader):.6f}")


teacher, student = Teacher().to(device), Student().to(device)
train_teacher(teacher, 3)
distill(teacher, student, 3)
print("teacher gradients:", [p.grad is not None for p in teacher.parameters()][:1], "frozen:", not any(p.requires_grad for p in teacher.parameters()))

# Karpathy's char-rnn idea on one sentence: GRU, clip_grad_norm_ each step, sampling greedily at the end.
import torch
from torch import nn

text = "the quick brown fox jumps over the lazy dog and the dog sleeps on while the fox runs away. " * 4
chars = sorted(set(text))
stoi = {c: i for i, c in enumerate(chars)}
itos = {i: c for c, i in stoi.items()}
encoded = torch.tensor([stoi[c] for c in text])
block = 12
X = torch.stack([encoded[i:i + block] for i in range(0, len(encoded) - block - 1, 3)])
Y = torch.stack([encoded[i + 1:i + block + 1] for i in range(0, len(encoded) - block - 1, 3)])


class CharRNN(nn.Module):
    def __init__(self, vocab, hidden=32):
        super().__init__()
        self.embedding = nn.Embedding(vocab, 16)
        self.gru = nn.GRU(16, hidden, batch_first=True)
        self.out = nn.Linear(hidden, vocab)

    def forward(self, x):
        h, _ = self.gru(self.embedding(x))
        return self.out(h)


torch.manual_seed(1337)
device = 'cuda' if torch.cuda.is_available() else 'cpu'
model = CharRNN(len(chars)).to(device)
print(sum(p.numel() for p in model.parameters()), 'parameters')
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for step in range(24):
    ix = torch.randint(len(X), (27,))
    xb, yb = X[ix].to(device), Y[ix].to(device)
    logits = model(xb)
    loss = nn.functional.cross_entropy(logits.view(-1, logits.size(-1)), yb.view(-1))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    gnorm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    if step % 4 == 0 or step == 23:
        print(f"step {step}: loss {loss.item():.6f}, grad norm {gnorm.item():.6f}")

model.eval()
idx = encoded[:4][None].to(device)
with torch.no_grad():
    for _ in range(8):
        nxt = model(idx)[:, -1].argmax(-1, keepdim=True)
        idx = torch.cat([idx, nxt], 1)
print("sample has", idx.shape[1], "characters")

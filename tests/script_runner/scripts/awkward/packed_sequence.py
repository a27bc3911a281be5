"""pack_padded_sequence inside forward with lengths on the CPU, and pad_packed_sequence back to the longest of the batch."""
import torch
import torch.nn as nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

torch.manual_seed(15)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(18, 10, padding_idx=0)
        self.lstm = nn.LSTM(10, 12, batch_first=True, bidirectional=True)
        self.tag = nn.Linear(24, 3)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(self.embed(x), lengths.cpu(), batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.tag(out)


sentences = [torch.randint(1, 18, (int(torch.randint(2, 9, ())),)) for _ in range(53)]
model = Tagger().to(device)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for epoch in range(3):
    total = 0.0
    for i in range(0, 53, 15):
        group = sentences[i:i + 15]
        x = pad_sequence(group, batch_first=True)
        y = torch.where(x == 0, -100, x % 3)
        lengths = torch.tensor([len(s) for s in group])
        logits = model(x.to(device), lengths)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten().to(device), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(group)
    print("epoch %d loss %.6f" % (epoch, total / 53))

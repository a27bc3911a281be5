"""A transformer encoder with src_key_padding_mask, pad_sequence in the collate function, masked mean pooling."""
import random

import torch
import torch.nn as nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

random.seed(9)
torch.manual_seed(9)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAD = 0


class Sentences(Dataset):
    def __init__(self, n):
        self.rows = [[random.randint(1, 19) for _ in range(random.randint(3, 12))] for _ in range(n)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        return torch.tensor(row), int(sum(t > 10 for t in row) > len(row) / 2)


def collate_fn(batch):
    texts, labels = zip(*batch)
    return pad_sequence(texts, batch_first=True, padding_value=PAD), torch.tensor(labels)


class TransformerClassifier(nn.Module):
    def __init__(self, vocab=20, d_model=16, nhead=2, layers=1):
        super().__init__()
        self.embedding = nn.Embedding(vocab, d_model, padding_idx=PAD)
        encoder_layer = nn.TransformerEncoderLayer(d_model, nhead, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(encoder_layer, layers, enable_nested_tensor=False)
        self.fc = nn.Linear(d_model, 2)

    def forward(self, src, src_key_padding_mask):
        out = self.encoder(self.embedding(src), src_key_padding_mask=src_key_padding_mask)
        keep = (~src_key_padding_mask).unsqueeze(-1).float()
        return self.fc((out * keep).sum(1) / keep.sum(1))


loader = DataLoader(Sentences(85), batch_size=16, shuffle=True, collate_fn=collate_fn)
model = TransformerClassifier().to(device)
if torch.cuda.device_count() > 1:
    model = nn.DataParallel(model)
optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
criterion = nn.CrossEntropyLoss()
for epoch in range(4):
    model.train()
    total_loss = 0
    for src, label in loader:
        src, label = src.to(device), label.to(device)
        out = model(src, src_key_padding_mask=(src == PAD))
        loss = criterion(out, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total_loss += loss.item()
    print(f'| epoch {epoch + 1} | loss {total_loss / len(loader):.6f} |')

# Encoder and decoder as two modules called token by token; the hidden state is (layers, batch, hidden), the batch is dimension 1.
import random

import torch
import torch.nn as nn

random.seed(0)
torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
V, H, SOS = 12, 20, 0


class EncoderRNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, H)
        self.gru = nn.GRU(H, H, batch_first=True)

    def forward(self, input):
        return self.gru(self.embedding(input))


class DecoderRNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, H)
        self.gru = nn.GRU(H, H, batch_first=True)
        self.out = nn.Linear(H, V)

    def forward(self, input, hidden):
        output, hidden = self.gru(self.embedding(input).relu(), hidden)
        return self.out(output[:, -1]), hidden


encoder, decoder = EncoderRNN().to(device), DecoderRNN().to(device)
enc_opt = torch.optim.Adam(encoder.parameters(), lr=5e-3)
dec_opt = torch.optim.Adam(decoder.parameters(), lr=5e-3)
criterion = nn.CrossEntropyLoss()
source = torch.randint(1, V, (46, 5))
target = source.flip(1)
for epoch in range(4):
    total = 0.0
    for s, t in zip(source.split(16), target.split(16)):
        s, t = s.to(device), t.to(device)
        enc_opt.zero_grad()
        dec_opt.zero_grad()
        _, hidden = encoder(s)
        token = torch.full((len(s), 1), SOS, device=device)
        loss = 0
        teacher_forcing = random.random() < 0.5
        for k in range(5):
            logits, hidden = decoder(token, hidden)
            loss = loss + criterion(logits, t[:, k])
            token = t[:, k:k + 1] if teacher_forcing else logits.argmax(1, keepdim=True).detach()
        loss.backward()
        enc_opt.step()
        dec_opt.step()
        total += loss.item() / 5 * len(s)
    print("epoch", epoch, "%.6f" % (total / 46))

"""A Hugging Face GPT-2 from a small config: model(**batch).loss.mean(), AdamW, save_pretrained not needed."""
import sys

import torch
from torch.nn import DataParallel

try:
    from transformers import GPT2Config, GPT2LMHeadModel, set_seed
except ImportError:
    print("SKIP transformers")
    sys.exit(0)

set_seed(42)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
config = GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2,
                    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
model = GPT2LMHeadModel(config)
model.to(device)
if torch.cuda.device_count() > 1:
    model = DataParallel(model)
model.train()

tokens = (torch.arange(16)[None] * torch.randint(1, 4, (44, 1)) + torch.randint(0, 50, (44, 1))) % 50
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for epoch in range(3):
    for ids in tokens.split(16):
        batch = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device), "labels": ids.to(device)}
        outputs = model(**batch)
        loss = outputs.loss
        if loss.dim() > 0:  # mean() to average on multi-gpu parallel training
            loss = loss.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch} loss {loss.item():.6f}")

# A Hugging Face language model whose padded tokens have the label -100: its loss is a mean over tokens, not over samples.
import sys

import torch

try:
    from transformers import GPT2Config, GPT2LMHeadModel
except ImportError:
    print("SKIP transformers")
    sys.exit(0)

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
config = GPT2Config(
    vocab_size=40,
    n_positions=16,
    n_embd=32,
    n_layer=1,
    n_head=2,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=0,
    eos_token_id=0, use_cache=False,
)
model = GPT2LMHeadModel(config).to(device)
ids = torch.randint(1, 40, (36, 10))
lengths = torch.randint(3, 11, (36, 1))
mask = (torch.arange(10) < lengths).long()
mask[:12] = 1  # the first batch has no padding at all
labels = ids.masked_fill(mask == 0, -100)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for epoch in range(3):
    for start in range(0, 36, 12):
        part = slice(start, start + 12)
        out = model(ids[part].to(device), attention_mask=mask[part].to(device), labels=labels[part].to(device))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        print(f"epoch {epoch} step {start // 12} loss {out.loss.item():.6f}")

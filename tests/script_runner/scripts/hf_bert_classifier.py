# A Hugging Face classifier on one device, the way the course shows it: batches as dicts, outputs.loss, evaluation by logits.
import sys

import torch
from torch.utils.data import DataLoader

try:
    from transformers import BertConfig, BertForSequenceClassification
except ImportError:
    print("SKIP transformers")
    sys.exit(0)

torch.manual_seed(0)
config = BertConfig(
    vocab_size=60,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=32,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    num_labels=3,
)
model = BertForSequenceClassification(config)
lengths = torch.randint(4, 12, (90,))
dataset = []
for n in lengths.tolist():
    ids = torch.randint(1, 60, (n,))
    pad = 12 - n
    dataset.append(
        {
            "input_ids": torch.cat([ids, torch.zeros(pad, dtype=torch.long)]),
            "attention_mask": torch.cat([torch.ones(n, dtype=torch.long), torch.zeros(pad, dtype=torch.long)]),
            "labels": ids[0] % 3,
        }
    )
train_dataloader = DataLoader(dataset[:70], shuffle=True, batch_size=16)
eval_dataloader = DataLoader(dataset[70:], batch_size=8)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
model.to(device)
for epoch in range(3):
    model.train()
    total = 0.0
    for batch in train_dataloader:
        batch = {k: v.to(device) for k, v in batch.items()}
        outputs = model(**batch)
        loss = outputs.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
    model.eval()
    correct = 0
    for batch in eval_dataloader:
        batch = {k: v.to(device) for k, v in batch.items()}
        with torch.no_grad():
            outputs = model(**batch)
        correct += (outputs.logits.argmax(-1) == batch["labels"]).sum().item()
    print(f"epoch {epoch} loss {total / len(train_dataloader):.6f} accuracy {correct / 20:.2f}")

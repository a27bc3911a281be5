"""A home-made copy of the Hugging Face manner: forward returns a dataclass with logits and hidden states, by name."""
from dataclasses import dataclass
from typing import Optional, Tuple

import torch
from torch import Tensor, nn


@dataclass
class ModelOutput:
    logits: Tensor
    hidden_states: Optional[Tuple[Tensor, ...]] = None


class TinyBert(nn.Module):
    def __init__(self, vocab: int = 30, width: int = 24, layers: int = 2, labels: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.position = nn.Parameter(torch.randn(1, 10, width) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 48, dropout=0.0, batch_first=True) for _ in range(layers)
        )
        self.classifier = nn.Linear(width, labels)

    def forward(self, input_ids: Tensor, output_hidden_states: bool = False) -> ModelOutput:
        h = self.embed(input_ids) + self.position
        states = [h]
        for layer in self.layers:
            h = layer(h)
            states.append(h)
        return ModelOutput(
            logits=self.classifier(h[:, 0]),
            hidden_states=tuple(states) if output_hidden_states else None,
        )


def main() -> None:
    torch.manual_seed(7)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ids = torch.randint(0, 30, (85, 10))
    labels = ids[:, :3].sum(1) % 3
    model = TinyBert().to(device)
    if torch.cuda.device_count() > 1:
        model = nn.DataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in range(4):
        for batch_ids, batch_labels in zip(ids.split(20), labels.split(20)):
            outputs = model(input_ids=batch_ids.to(device), output_hidden_states=True)
            loss = nn.functional.cross_entropy(outputs.logits, batch_labels.to(device))
            loss = loss + 1e-3 * outputs.hidden_states[-1].pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch={epoch} loss={loss.item():.7f} hidden={len(outputs.hidden_states)}")
    model.eval()
    with torch.no_grad():
        out = model(ids.to(device))
    print("hidden states without asking:", out.hidden_states, "logits", tuple(out.logits.shape))


if __name__ == "__main__":
    main()

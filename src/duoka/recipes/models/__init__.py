"""Networks that the recipes train; each is an ordinary ``torch.nn.Module``."""

"""The package's networks, by name."""
from .mlp import MLP

MODELS = {"mlp": MLP}

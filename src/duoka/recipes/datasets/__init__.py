"""Image sets that the recipes train on: each module reads one kind of source into an ``ImageSet``."""

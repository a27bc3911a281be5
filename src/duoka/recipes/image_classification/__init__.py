"""Recipes ``cifar100`` and ``tiny-imagenet``: image classification with ResNets and small CNNs."""

"""Transports of tensors: shared memory for CPU workers, collectives for accelerators."""

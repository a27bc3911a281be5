"""Transports of tensors between rank 0 and its workers: shared memory for CPU workers, collectives for accelerators."""

"""Loaders without torch.utils.data: iterators that yield tuples of tensors, already on the device."""
import numpy as np
import torch


class TrainDataLoader:
    def __init__(self, data, n_items, batch_size=128, shuffle=True, device='cpu', seed=0):
        self.data, self.n_items, self.batch_size = data, n_items, batch_size
        self.shuffle, self.device = shuffle, device
        self.rng = np.random.RandomState(seed)

    def __len__(self):
        return (len(self.data) + self.batch_size - 1) // self.batch_size

    def __iter__(self):
        order = self.rng.permutation(len(self.data)) if self.shuffle else np.arange(len(self.data))
        for start in range(0, len(order), self.batch_size):
            rows = self.data[order[start:start + self.batch_size]]
            negatives = self.rng.randint(0, self.n_items, len(rows))
            yield (torch.from_numpy(rows[:, 0]).to(self.device),
                   torch.from_numpy(rows[:, 1]).to(self.device),
                   torch.from_numpy(negatives).to(self.device))


class EvalDataLoader:
    def __init__(self, data, batch_size=128, device='cpu'):
        self.data, self.batch_size, self.device = data, batch_size, device

    def __iter__(self):
        for start in range(0, len(self.data), self.batch_size):
            rows = torch.from_numpy(self.data[start:start + self.batch_size]).to(self.device)
            yield rows[:, 0], rows[:, 1]

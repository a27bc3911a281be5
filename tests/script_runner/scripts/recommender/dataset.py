"""The ratings: a generated table of users and items in the place of MovieLens, split by time."""
import numpy as np


class RatingsDataset:
    def __init__(self, n_users=40, n_items=60, seed=0, split_ratio=(0.8, 0.1, 0.1)):
        rng = np.random.RandomState(seed)
        self.n_users, self.n_items = n_users, n_items
        users = rng.randint(0, n_users, 900)
        items = (users * 3 + rng.geometric(0.15, 900)) % n_items
        self.pairs = np.stack([users, items], 1)
        a = int(len(self.pairs) * split_ratio[0])
        b = a + int(len(self.pairs) * split_ratio[1])
        self.parts = {'train': self.pairs[:a], 'validation': self.pairs[a:b], 'test': self.pairs[b:]}

    def get_user_num(self):
        return self.n_users

    def get_item_num(self):
        return self.n_items

    def get_split_data(self, name):
        return self.parts[name]

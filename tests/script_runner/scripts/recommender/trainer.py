"""The Trainer class: wraps the model itself when it finds several GPUs, saves without the prefix, evaluates hits."""
import torch
import torch.nn as nn
import torch.nn.functional as F


class Trainer:
    def __init__(self, model, train_data, eval_data, test_data=None, device='cuda', epochs=5, lr=1e-3,
                 use_multi_gpu=True):
        if device == 'cuda' and not torch.cuda.is_available():
            print('警告: 没有检测到GPU，回退到CPU')
            device = 'cpu'
        self.device = torch.device(device)
        self.model = model.to(self.device)
        self.n_gpu = torch.cuda.device_count() if use_multi_gpu else 1
        if self.n_gpu > 1:
            print(f'检测到 {self.n_gpu} 张GPU，将使用 DataParallel 进行多GPU训练')
            self.model = nn.DataParallel(self.model)
        self.train_data, self.eval_data, self.test_data = train_data, eval_data, test_data
        self.epochs = epochs
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)

    def _get_model(self):
        return self.model.module if isinstance(self.model, nn.DataParallel) else self.model

    def _train_epoch(self):
        self.model.train()
        total, n = 0.0, 0
        for users, positives, negatives in self.train_data:
            users, positives, negatives = users.to(self.device), positives.to(self.device), negatives.to(self.device)
            pos = self.model(users, positives)
            neg = self.model(users, negatives)
            loss = -F.logsigmoid(pos - neg).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.item() * len(users)
            n += len(users)
        return total / n

    @torch.no_grad()
    def evaluate(self, data, k=10):
        self.model.eval()
        net = self._get_model()
        loss, hits, n = 0.0, 0, 0
        for users, items in data:
            users, items = users.to(self.device), items.to(self.device)
            scores = net.full_scores(users)
            loss += F.cross_entropy(scores, items, reduction='sum').item()
            hits += (scores.topk(k, 1).indices == items[:, None]).any(1).sum().item()
            n += len(users)
        return loss / n, hits / n

    def fit(self, save_model=False, model_path='model.pth'):
        best = float('inf')
        for epoch in range(self.epochs):
            train_loss = self._train_epoch()
            eval_loss, hit = self.evaluate(self.eval_data)
            print(f'Epoch {epoch + 1}/{self.epochs} train_loss={train_loss:.6f} eval_loss={eval_loss:.6f}')
            if eval_loss < best:
                best = eval_loss
                if save_model:
                    torch.save(self._get_model().state_dict(), model_path)
        if save_model:
            self._get_model().load_state_dict(torch.load(model_path, map_location=self.device))
        if self.test_data is not None:
            print('test_loss=%.6f' % self.evaluate(self.test_data)[0])

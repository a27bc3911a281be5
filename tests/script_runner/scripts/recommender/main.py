"""A project of several files that import one another by name, and a class-based Trainer; run from anywhere."""
import torch
from dataloader import EvalDataLoader, TrainDataLoader
from dataset import RatingsDataset
from model import Recommender
from trainer import Trainer

torch.manual_seed(2023)
dataset = RatingsDataset()
train_data = dataset.get_split_data('train')
valid_data = dataset.get_split_data('validation')
test_data = dataset.get_split_data('test')

model = Recommender(n_users=dataset.get_user_num(), n_items=dataset.get_item_num(), embed_dim=16)

train_loader = TrainDataLoader(train_data, dataset.get_item_num(), batch_size=128, shuffle=True)
valid_loader = EvalDataLoader(valid_data, batch_size=64)
test_loader = EvalDataLoader(test_data, batch_size=64)

trainer = Trainer(model=model, train_data=train_loader, eval_data=valid_loader, test_data=test_loader,
                  device='cuda', epochs=4, lr=1e-2)
trainer.fit(save_model=True, model_path='model.pth')
print('recommended items:', len(model.recommend(3)))

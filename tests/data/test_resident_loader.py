"""Device-resident data: the same batches for any number of ranks and after a resume."""

import pickle

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import duoka
from duoka.data import DataPosition, DeviceResidentLoader, local_batches, resident, resident_loader, transforms
from duoka.errors import ConfigError, DataError

PIXELS = torch.randint(0, 256, (37, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(37)
CHANGES = [transforms.RandomResizedCrop(8), transforms.RandomHorizontalFlip(), transforms.ColorJitter(0.2, 0.2, 0.2)]


def loader(**options) -> DeviceResidentLoader:
    return resident((PIXELS, LABELS), **{"batch_size": 5, "shuffle": True, "transforms": CHANGES, **options})


def epoch(data, size: int, *, skip: int = 0, number: int = 0, training: bool = True, batches_per_step: int = 1):
    """All ranks' parts of an epoch, joined as one device would have them: a list of (images, labels)."""
    ranks = []
    for rank in range(size):
        sharded = local_batches(
            data, rank=rank, world_size=size, seed=3, batches_per_step=batches_per_step, training=training
        )
        sharded.set_position(DataPosition(3, number, skip))
        ranks.append(list(sharded))
    joined = []
    for parts in zip(*ranks, strict=True):
        assert sum(part.count for part in parts) == parts[0].global_count
        batches = [[tensor[: part.count] for tensor in part.batch] for part in parts if part.count]
        joined.append([torch.cat(column) for column in zip(*batches, strict=True)])
    return joined


def same(first, second) -> bool:
    return len(first) == len(second) and all(
        torch.allclose(a.float(), b.float(), atol=1e-5)
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(
    "mix", [None, v2.MixUp(num_classes=37), v2.CutMix(num_classes=37)], ids=["plain", "mixup", "cutmix"]
)
@pytest.mark.parametrize("size", [2, 3, 7])
def test_batches_are_the_same_on_any_number_of_ranks(size, mix):
    assert same(epoch(loader(mix=mix), 1), epoch(loader(mix=mix), size))


@pytest.mark.parametrize("mix", [None, v2.MixUp(num_classes=37)], ids=["plain", "mixup"])
def test_batches_are_the_same_after_a_resume_on_another_number_of_ranks(mix):
    whole = epoch(loader(mix=mix), 1, number=2)
    assert same(whole[3:], epoch(loader(mix=mix), 2, skip=15, number=2))
    merged = epoch(loader(mix=mix), 2, batches_per_step=2, number=2)
    assert same(merged[1:], epoch(loader(mix=mix), 1, batches_per_step=2, skip=10, number=2))


def test_each_epoch_has_every_sample_once_in_a_new_order():
    first, second = epoch(loader(), 1), epoch(loader(), 1, number=1)
    for batches in (first, second):
        assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == LABELS.tolist()
    assert not same(first, second)
    ordered = loader(shuffle=False)
    one, other = (torch.cat([images for images, _ in epoch(ordered, 1, number=n)]) for n in (0, 1))
    assert not torch.allclose(one, other)
    assert len({tuple(image.flatten().tolist()) for image in one}) == 37


def test_without_changes_samples_are_what_they_were():
    batches = epoch(loader(transforms=[], shuffle=False), 2)
    assert torch.equal(torch.cat([images for images, _ in batches]), PIXELS)


def test_evaluation_is_the_same_every_time_and_counts_every_sample_once():
    still = loader(shuffle=False, transforms=[transforms.Normalize((0.5,) * 3, (0.2,) * 3)])
    assert same(epoch(still, 1, training=False), epoch(still, 3, number=4, training=False))
    parts = list(local_batches(loader(), rank=6, world_size=7, seed=0, training=False))
    assert parts[-1].batch is None


@pytest.mark.parametrize(
    ("drop", "batches_per_step", "lengths"), [(False, 1, 8), (True, 1, 7), (True, 2, 3), (False, 2, 4)]
)
def test_lengths_are_known_before_iteration(drop, batches_per_step, lengths):
    sharded = local_batches(loader(drop_last=drop), rank=0, world_size=2, seed=0, batches_per_step=batches_per_step)
    parts = list(sharded)
    assert len(sharded) == len(parts) == lengths
    assert sharded.samples_per_epoch == sum(part.global_count for part in parts)
    like = DataLoader(torch.utils.data.TensorDataset(PIXELS, LABELS), 5, drop_last=drop)
    other = local_batches(like, rank=0, world_size=2, seed=0, batches_per_step=batches_per_step)
    assert [part.global_count for part in other] == [part.global_count for part in parts]


@pytest.mark.parametrize("kind", [v2.MixUp, v2.CutMix])
def test_mixing_is_torchvisions_of_the_whole_batch(kind):
    transform = kind(num_classes=37)
    plain, mixed = epoch(loader(), 1), epoch(loader(mix=transform), 1)
    for (images, labels), (images_mixed, targets) in zip(plain, mixed, strict=True):
        partners = labels.roll(1)
        share = targets.gather(1, partners[:, None])[0, 0]
        expected = (
            torch.nn.functional.one_hot(labels, 37) * (1 - share) + torch.nn.functional.one_hot(partners, 37) * share
        )
        assert torch.allclose(targets, expected, atol=1e-5)
        if kind is v2.MixUp:
            assert torch.allclose(images_mixed, images * (1 - share) + images.roll(1, 0) * share, atol=1e-5)
        else:
            own, theirs = (
                torch.isclose(images_mixed, source, atol=1e-5).all(1) for source in (images, images.roll(1, 0))
            )
            assert (own | theirs).all()
            assert (~own).float().mean() == pytest.approx(float(share), abs=0.05)


def test_the_users_generators_keep_their_state():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    epoch(loader(mix=v2.MixUp(num_classes=37)), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_can_be_iterated_without_a_trainer():
    own = loader(seed=5)
    first, second = list(own), list(own)
    assert len(first) == len(own) == 8
    assert not same(first, second)
    again = loader(seed=5)
    assert same(first, list(again))
    assert same(second, list(again))


def test_a_trainer_learns_the_same_on_two_devices_and_predicts_in_order():
    def fit(device: str) -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 37))
        data = loader(transforms=[*CHANGES, transforms.Normalize((0.5,) * 3, (0.3,) * 3)])
        options = {
            "loss": torch.nn.functional.cross_entropy,
            "epochs": 2,
            "batch_size_means": "global",
            "verbose": False,
        }
        trainer = duoka.Trainer(model, data, device=device, optimizer="sgd", lr=0.1, **options)
        trainer.fit(save_model=False)
        return trainer.predict(data)

    one, two = fit("cpu"), fit("cpu:2")
    assert one.shape == (37, 37)
    assert torch.allclose(one, two, atol=1e-4)


class Squares(Dataset):
    """A map-style data set of ``(image, label)``."""

    def __init__(self, sides: tuple[int, ...] = (8,)) -> None:
        self.sides = sides

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int):
        side = self.sides[index % len(self.sides)]
        return torch.full((3, side, side), index, dtype=torch.uint8), index


def test_a_data_set_is_read_once_and_kept():
    kept = resident(Squares(), batch_size=4)
    assert isinstance(kept, DeviceResidentLoader)
    images, labels = (torch.cat(column) for column in zip(*kept, strict=True))
    assert labels.tolist() == list(range(12))
    assert images[:, 0, 0, 0].tolist() == list(range(12))


@pytest.mark.parametrize("why", ["large", "shapes"])
def test_data_that_cannot_be_kept_are_read_by_a_dataloader(why, monkeypatch, caplog):
    if why == "large":
        monkeypatch.setattr(resident_loader, "MEMORY_FRACTION", 1e-12)
    data = Squares((8, 9) if why == "shapes" else (8,))
    mixed = v2.MixUp(num_classes=12)
    read = resident(data, batch_size=4, transforms=[transforms.RandomResizedCrop(8)], mix=mixed, num_workers=0)
    assert isinstance(read, DataLoader)
    assert {"large": "are more than", "shapes": "different shapes"}[why] in caplog.text
    images, targets = next(iter(read))
    assert images.shape == (4, 3, 8, 8)
    assert torch.allclose(targets.sum(1), torch.ones(4))
    assert images.max() <= 1


def test_an_accelerator_without_room_is_sent_batches_from_the_host(monkeypatch, caplog):
    monkeypatch.setattr(resident_loader, "_free_bytes", lambda device: 100)
    there = loader()._on(torch.device("cuda", 0))
    assert there[0] is PIXELS
    assert "stay on the host" in caplog.text


def test_copies_on_devices_are_not_pickled():
    own = loader()
    own._copies[torch.device("meta")] = own.tensors
    assert pickle.loads(pickle.dumps(own))._copies == {}


@pytest.mark.parametrize(("data", "options", "error", "message"), [
    ((PIXELS, LABELS[:3]), {}, DataError, "37, 3 samples"),
    (iter([]), {}, ConfigError, "map-style"),
    ([], {}, DataError, "no sample"),
    ([1, 2], {}, DataError, "no tuples"),
    ((PIXELS, LABELS), {"batch_size": 0}, ConfigError, "batch_size=0"),
])  # fmt: skip
def test_invalid_data_are_refused(data, options, error, message):
    with pytest.raises(error, match=message):
        resident(data, **{"batch_size": 4, **options})

"""The recommenders: loss, equal steps on any number of devices, recommendations, and rejected options."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import cosine_similarity, logsigmoid
from torch.utils.data import DataLoader, Dataset

import duoka
from duoka.errors import ConfigError
from duoka.recipes.models.gpt2_recommender import (
    GPT2Recommender,
    GPT2RecommenderEnhanced,
    copy_stage1_weights,
    two_lr_groups,
)
from duoka.recipes.models.gpt2_text_encoder import TokenizedTexts, tokenize_texts
from duoka.recipes.models.recommender import NCF

pytestmark = pytest.mark.usefixtures("one_thread")
USERS, ITEMS = 40, 60
GENRES = ("Comedy", "Drama", "Comedy, Drama", "Horror", "War")
JOBS = ("writer", "farmer", "artist")
BOTH = pytest.mark.parametrize("kind", [GPT2Recommender, GPT2RecommenderEnhanced])


@pytest.fixture(scope="module")
def texts() -> TokenizedTexts:
    users = [f"{('female', 'male')[n % 2]}\n{18 + n // 8}\n{JOBS[n % 3]}" for n in range(USERS)]
    items = [f"{GENRES[n % 5]}\n{'The ' * (n % 4)}Film of {n} ({1940 + n})" for n in range(ITEMS)]
    return tokenize_texts(users, items)


class Triples(Dataset):
    """Users, items that they have seen, and items that they have not."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.users = torch.randint(USERS, (count,), generator=generator)
        self.positives = torch.randint(ITEMS, (count,), generator=generator)
        self.negatives = torch.randint(ITEMS, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index) -> dict[str, torch.Tensor]:
        return {name: values[index] for name, values in vars(self).items()}


def gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.loss(batch).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(one, other, tolerance=1e-6) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.allclose(value.double(), other[name].double(), atol=tolerance), name


@BOTH
def test_the_loss_is_bpr_and_a_tenth_of_infonce(kind, texts):
    model = kind(texts, candidates=16).eval()
    batch = Triples(50)[:]
    users, positives, negatives = batch.values()
    better, worse = model.predict(users, positives), model.predict(users, negatives)
    bpr = -logsigmoid(better - worse).mean()
    ids = positives[:16].unique()
    vectors, item_vectors = model.scorer().users.dot[users], model.scorer().items.dot
    contrast = 0.0
    for user, positive in zip(vectors, positives, strict=True):
        candidates = item_vectors[torch.cat([positive.unsqueeze(0), ids[ids != positive]])]
        contrast -= (cosine_similarity(user.unsqueeze(0), candidates) / 0.2).log_softmax(0)[0]
    assert torch.allclose(model.loss(batch), bpr + 0.1 * contrast / 50, atol=1e-5)


@BOTH
@pytest.mark.parametrize("cached", [True, False])
def test_one_and_two_devices_take_the_same_steps(kind, cached, texts):
    def trained(device: str) -> dict[str, torch.Tensor]:
        model = kind(texts, use_cache=cached, candidates=20)
        data = DataLoader(Triples(65), batch_size=32, shuffle=True)  # 32, 32, and one sample for two devices
        options = {
            "device": device,
            "batch_size_means": "global",
            "epochs": 1,
            "verbose": False,
            "optimizer": "sgd",
            "lr": 0.1,
        }
        duoka.Trainer(model, data, loss="loss", **options).fit()
        return model.state_dict()

    close(trained("cpu"), trained("cpu:2"))


def test_three_devices_share_the_candidates_of_the_contrastive_loss(texts):
    def trained(device: str) -> dict[str, torch.Tensor]:
        model = GPT2RecommenderEnhanced(texts, candidates=30, contrast=1.0)
        data = DataLoader(Triples(70), batch_size=70)
        duoka.Trainer(
            model,
            data,
            loss="loss",
            device=device,
            batch_size_means="global",
            epochs=2,
            verbose=False,
            optimizer="sgd",
            lr=0.1,
        ).fit()
        return model.state_dict()

    close(trained("cpu"), trained("cpu:3"))


@pytest.mark.parametrize("build", [GPT2Recommender, GPT2RecommenderEnhanced, lambda texts: NCF(USERS, ITEMS)])
def test_scores_of_all_pairs_equal_those_of_single_pairs(build, texts):
    model = build(texts).eval()
    users, items = torch.arange(USERS), torch.arange(ITEMS)
    whole = model.score_all(users)
    assert whole.shape == (USERS, ITEMS)
    each = model.predict(users.repeat_interleave(ITEMS), items.repeat(USERS)).view(USERS, ITEMS)
    assert torch.allclose(whole, each, atol=1e-6)
    assert torch.equal(model.score_all(torch.tensor([7, 3])), whole[[7, 3]])
    assert torch.allclose(whole, plain_scores(model), atol=1e-5)


def test_autocast_leaves_scores_and_loss_in_float32(texts):
    model = GPT2RecommenderEnhanced(texts, use_cache=False)
    users = torch.arange(USERS)
    with torch.autocast("cpu", torch.bfloat16):
        half, loss = model.score_all(users), model.loss(Triples(50)[:])
        loss.backward()
    assert half.dtype == loss.dtype == torch.float32
    assert torch.allclose(half, model.score_all(users), atol=0.05)


@torch.no_grad()
def plain_scores(model) -> torch.Tensor:
    """Scores by concatenating the two vectors of each pair."""
    user, item = model.vectors(torch.arange(USERS), torch.arange(ITEMS))
    user, item = user.repeat_interleave(ITEMS, 0), item.repeat(USERS, 1)
    score, dot = model.score, model.score.dot_width
    joined = torch.cat([user[:, dot:], item[:, dot:]] if score.is_split else [user, item], 1)
    first = torch.nn.functional.linear(
        joined, torch.cat([score.user_layer.weight, score.item_layer.weight], 1), score.item_layer.bias
    )
    mlp = score.out_layer(score.hidden_layer(first.relu()).relu()).squeeze(1)
    return ((user[:, :dot] * item[:, :dot]).sum(1) + mlp).view(USERS, ITEMS)


def test_recommendations_are_the_best_unseen_items(texts):
    model = GPT2RecommenderEnhanced(texts)
    seen = range(0, ITEMS, 2)
    items, scores = model.recommend(4, 7, seen)
    assert len(items) == 7
    assert not set(items.tolist()) & set(seen)
    assert all(one >= other for one, other in pairwise(scores.tolist()))
    scores_of_user = model.score_all(torch.tensor([4]))[0]
    assert scores[0] == scores_of_user[1::2].max()
    assert len(model.recommend(4, 50, seen)[0]) == ITEMS // 2
    assert len(model.recommend(4, 3, range(ITEMS))[0]) == 0
    with pytest.raises(ConfigError, match="user=40"):
        model.recommend(40)
    with pytest.raises(ConfigError, match="item=60"):
        model.recommend(4, 3, [2, 60])


def test_attention_weights_of_id_and_fields_sum_to_one(texts):
    model = GPT2RecommenderEnhanced(texts)
    weights = model.attention_weights(users=torch.tensor([5, 3, 5]))
    assert weights.shape == (3, 4)
    assert torch.allclose(weights.sum(1), torch.ones(3))
    assert torch.equal(weights[0], weights[2])
    assert model.attention_weights(items=torch.arange(2)).shape == (2, 3)
    dynamic = GPT2RecommenderEnhanced(texts, use_cache=False)
    assert torch.allclose(
        dynamic.attention_weights(items=torch.arange(9)), model.attention_weights(items=torch.arange(9)), atol=1e-5
    )
    with pytest.raises(ConfigError, match="GPT2RecommenderEnhanced"):
        GPT2Recommender(texts).attention_weights(users=torch.arange(2))
    with pytest.raises(ConfigError, match="users= or items="):
        model.attention_weights()


@BOTH
def test_a_hidden_item_depends_on_its_text_alone(kind, texts):
    model = kind(texts).eval()
    before = model.scorer().items.dot
    model.hide_ids(items=torch.tensor([3, 8]))
    with torch.no_grad():
        model.item.ids.weight[[3, 8]] += 1.0
    after = model.scorer().items.dot
    assert not torch.allclose(after[3], after[8])
    others = torch.ones(ITEMS, dtype=torch.bool)
    others[[3, 8]] = False
    assert torch.allclose(before[others], after[others])
    found = gradients(
        model, {"users": torch.arange(4), "positives": torch.tensor([3, 8] * 2), "negatives": torch.arange(4) + 20}
    )
    assert found["item.ids.weight"][[3, 8]].abs().sum() == 0
    assert found["item.ids.weight"][ITEMS].abs().sum() > 0
    again = kind(texts)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.scorer().items.dot, after)


def test_id_dropout_hides_new_ids_each_training_step_and_none_in_eval(texts):
    model = GPT2RecommenderEnhanced(texts, id_dropout=0.5)
    ids = torch.arange(USERS), torch.arange(ITEMS)
    one, other = model.vectors(*ids)[0], model.vectors(*ids)[0]
    assert 0.1 < (one != other).any(1).float().mean() < 0.9
    model.eval()
    assert torch.equal(model.vectors(*ids)[0], model.vectors(*ids)[0])
    assert model.step == 2


@BOTH
def test_the_dynamic_stage_starts_from_the_cached_stages_weights(kind, texts):
    cached = kind(texts)
    duoka.Trainer(
        cached, DataLoader(Triples(64), batch_size=32), loss="loss", epochs=1, device="cpu", verbose=False
    ).fit()
    dynamic = kind(texts, use_cache=False)
    copy_stage1_weights(cached, dynamic)
    users = torch.arange(USERS)
    assert torch.allclose(dynamic.score_all(users), cached.score_all(users), atol=1e-5)
    close(*(without_text(gradients(model, Triples(64)[:])) for model in (cached, dynamic)), tolerance=1e-5)
    with pytest.raises(ConfigError, match="differ in"):
        copy_stage1_weights(kind(texts, embedding_size=32), dynamic)


def without_text(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in found.items() if not name.startswith("encoder.")}


def test_gpt2_gets_its_own_learning_rate(texts):
    model = GPT2Recommender(texts, use_cache=False)
    before = copy.deepcopy(model.state_dict())
    trainer = duoka.Trainer(
        model, DataLoader(Triples(64), batch_size=32), loss="loss", epochs=1, device="cpu:2", batch_size_means="global",
        optimizer=two_lr_groups(model, lr=1e-2, text_lr=1e-5), verbose=False,
    )  # fmt: skip
    trainer.fit()
    moved = {
        name: (value.double() - before[name].double()).abs().max().item() for name, value in model.state_dict().items()
    }
    text = [move for name, move in moved.items() if "lora_B" in name]
    assert all(0 < move < 1e-4 for move in text)
    assert moved["score.hidden_layer.weight"] > 5e-3
    assert all(move == 0 for name, move in moved.items() if name.startswith("encoder.") and "lora" not in name)


@BOTH
@pytest.mark.parametrize("cached", [True, False])
def test_saved_weights_are_complete_and_load_without_code(kind, cached, texts, tmp_path):
    model = kind(texts, use_cache=cached, seed=3)
    duoka.save(model, tmp_path / "model.safetensors")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    users = torch.arange(USERS)
    for path in tmp_path.iterdir():
        other = kind(texts, use_cache=cached, seed=4)
        assert not torch.allclose(other.score_all(users), model.score_all(users))
        if path.suffix == ".pt":
            other.load_state_dict(torch.load(path, weights_only=True))
        else:
            duoka.load(path, into=other)
        assert torch.equal(other.score_all(users), model.score_all(users))
    clone = pickle.loads(pickle.dumps(model))
    assert torch.equal(clone.score_all(users), model.score_all(users))


def tokenize_on_each_rank() -> list[tuple[list[float], int]]:
    texts = tokenize_texts(["a man\nof 25", "a woman\nof 25"], ["Comedy\nThe Night", "War\nThe Long Night (1995)"])
    sums = [parameter.double().abs().sum().item() for parameter in texts.network.parameters()]
    return duoka.current_world().all_gather_object((sums, texts.spans.tokens.tolist()))


def test_all_ranks_make_the_same_tokens_and_weights():
    one, other = duoka.launch(tokenize_on_each_rank, devices="cpu:2")
    assert one == other


def test_the_seed_sets_the_weights_but_not_the_global_generator(texts):
    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    one, same, other = (GPT2RecommenderEnhanced(texts, use_cache=False, seed=seed) for seed in (1, 1, 2))
    assert torch.rand(1) == expected
    close(one.state_dict(), same.state_dict(), 0.0)
    assert not torch.equal(one.user.ids.weight, other.user.ids.weight)


def test_ncf_learns_preferences():
    users = torch.arange(USERS).repeat_interleave(ITEMS // 2)
    liked = torch.arange(ITEMS).view(-1, 2)[:, 0].repeat(USERS) + users % 2
    data = [{"users": users, "positives": liked, "negatives": liked + 1 - 2 * (users % 2)}] * 30
    model = NCF(USERS, ITEMS, embedding_size=8)
    duoka.Trainer(model, data, loss="loss", epochs=1, lr=0.02, device="cpu", verbose=False).fit()
    assert (model.predict(users, liked) > model.predict(users, data[0]["negatives"])).float().mean() > 0.95


def test_training_a_cached_text_encoder_is_rejected(texts):
    with pytest.raises(ConfigError, match="no gradient reaches"):
        GPT2Recommender(texts, use_cache=True, train_text="lora")
    frozen = GPT2Recommender(texts, use_cache=False, train_text="frozen")
    assert not any(name.startswith("encoder.") for name in gradients(frozen, Triples(8)[:]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding_size": 30}, "heads=4"),
        ({"contrast": -1.0}, "contrast=-1.0"),
        ({"temperature": 0.01}, "temperature=0.01"),
        ({"id_dropout": 1.0}, "id_dropout=1.0"),
        ({"use_cache": False, "train_text": "half"}, "train_text='half'"),
    ],
)
def test_invalid_values_are_rejected(options, message, texts):
    with pytest.raises(ConfigError, match=message):
        GPT2RecommenderEnhanced(texts, **options)

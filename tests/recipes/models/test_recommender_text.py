"""The text side: packed texts say what each says alone, gradients are exact, and the tokens are made once."""

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from torch.nn.functional import layer_norm

from duoka.errors import ConfigError, DataError
from duoka.recipes.models.gpt2_recommender import GPT2RecommenderEnhanced
from duoka.recipes.models.gpt2_text_encoder import Lora, TokenizedTexts, prepare
from duoka.recipes.models.prefix_packing import pack

USERS = ["a man\nof 25\nwriter", "a man\nof 25\nfarmer", "a woman\nof 25\nwriter", "a man\nof 25\nwriter"]
ITEMS = [
    "Comedy\nThe Night",
    "Comedy\nThe Night of the Long Day (1995)",
    "Comedy, Drama\nX",
    "War\nThe Night",
    "Comedy\nThe",
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def texts() -> TokenizedTexts:
    return prepare(USERS, ITEMS)


def one_by_one(network, tokens: list[int], ends: list[int]) -> torch.Tensor:
    """What a GPT-2 says of each field of a text that it is given alone, ``(fields, width)``."""
    states = network(input_ids=torch.tensor([tokens])).last_hidden_state[0]
    starts = [0, *ends[:-1]]
    return torch.stack([states[start:end].mean(0) for start, end in zip(starts, ends, strict=True)])


def plainly(texts: TokenizedTexts, network, side: str) -> torch.Tensor:
    """The vectors of every text of a side, each text computed by itself, ``(texts, fields, width)``."""
    pieces, chosen = texts.pieces, getattr(texts, side)
    rows = []
    for fields in (chosen.pieces + chosen.first).tolist():
        last = fields[-1]
        ends = [int(pieces.ends[field]) for field in fields]
        rows.append(one_by_one(network, pieces.tokens[last][: ends[-1]].tolist(), ends))
    return layer_norm(torch.stack(rows), (rows[0].shape[1],))


@pytest.mark.parametrize("training", ["frozen", "lora", "full"])
def test_a_texts_vector_is_what_gpt2_says_of_it_alone(training, texts):
    encoder = texts.encoder(training)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1) if parameter.requires_grad else None  # LoRA begins with no effect
    with torch.no_grad():
        packed = encoder(torch.arange(len(texts.pieces)))
        for side in ("users", "items"):
            chosen = getattr(texts, side)
            expected = plainly(texts, encoder.network, side)
            assert torch.allclose(packed[chosen.pieces + chosen.first], expected, atol=1e-5)


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("training", ["lora", "full"])
def test_gradients_are_those_of_encoding_every_text_by_itself(training, precision, tolerance, texts):
    encoder = texts.encoder(training).to(precision)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(len(USERS) * 3 + len(ITEMS) * 2, encoder.width, generator=generator, dtype=precision)
    for name, parameter in encoder.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator) if "lora_B" in name else None

    def gradients(vectors: torch.Tensor) -> list[torch.Tensor]:
        encoder.zero_grad()
        (vectors * weights).sum().backward()
        return [p.grad.clone() for p in encoder.parameters() if p.grad is not None]

    sides = [getattr(texts, side) for side in ("users", "items")]
    found = encoder(torch.arange(len(texts.pieces)))
    ours = gradients(torch.cat([found[(side.pieces + side.first).flatten()] for side in sides]))
    theirs = gradients(torch.cat([plainly(texts, encoder.network, side).flatten(0, 1) for side in ("users", "items")]))
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=tolerance * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("training", ["lora", "full"])
def test_a_steps_gradients_are_those_of_encoding_all_three_columns_as_they_come(training, texts):
    model = GPT2RecommenderEnhanced(texts, use_cache=False, train_text=training, id_dropout=0.5, contrast=1.0)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1) if "lora_B" in name else None
    batch = {"users": [0, 3, 2, 0, 1], "positives": [1, 1, 2, 4, 0], "negatives": [3, 0, 1, 1, 3]}
    batch = {name: torch.tensor(values) for name, values in batch.items()}

    def column(side: str, wanted: torch.Tensor) -> torch.Tensor:
        fields = plainly(texts, model.encoder.network, f"{side}s")[wanted]
        places = torch.arange(fields.shape[0] * fields.shape[1]).view(fields.shape[:2])
        return getattr(model, side)(wanted, fields.flatten(0, 1), places, model.draws, 0.5)[0]

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    ours = gradients(model.loss(batch))
    films = torch.cat([column("item", batch["positives"]), column("item", batch["negatives"])])
    at = torch.arange(10).view(2, 5)
    everyone = column("user", batch["users"]), films, at[0], at, batch["positives"]
    theirs = gradients(model.loss_of(*everyone))
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_vector_does_not_depend_on_what_is_encoded_with_it(texts):
    encoder = texts.encoder("frozen")
    together = encoder(torch.arange(len(texts.pieces)))
    for piece in range(len(texts.pieces)):
        assert torch.allclose(encoder(torch.tensor([piece]))[0], together[piece], atol=1e-6)
    assert encoder(torch.tensor([], dtype=torch.int64)).shape == (0, encoder.width)


def test_rows_are_cut_without_a_trace_when_everything_is_encoded():
    items = [f"Comedy\nFilm {n} of {n * n % 97} and {n % 7}" for n in range(700)]
    texts = prepare(USERS, items)
    vectors, encoder = texts.vectors(), texts.encoder("frozen")
    some = torch.arange(3, len(texts.pieces), 97)
    assert torch.allclose(encoder(some), vectors[some], atol=1e-5)
    assert texts.vectors() is vectors


def test_common_beginnings_and_equal_texts_are_computed_once(texts):
    pieces = texts.pieces
    packed = pack(pieces.tokens, pieces.starts, pieces.ends, 128)
    beginnings = {tuple(row[: n + 1]) for row, end in zip(pieces.tokens, pieces.ends, strict=True) for n in range(end)}
    assert len(packed.pairs) == len(beginnings)
    assert len(packed.tokens) == len({(text[-1], len(text)) for text in beginnings})
    assert texts.users.pieces[0].tolist() == texts.users.pieces[3].tolist()
    assert len(set(texts.users.pieces[:2, 0].tolist())) == 1  # "a man", whatever comes after


@pytest.mark.parametrize("row_length", [5, 7, 12, 40])
def test_every_token_sees_its_own_text_and_nothing_else(row_length):
    random = np.random.default_rng(0)
    texts = sorted({tuple(random.integers(0, 2, random.integers(1, 6)).tolist()) for _ in range(30)})
    ends = np.array([len(text) for text in texts])
    tokens = np.full((len(texts), ends.max()), -1)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    starts = ends - 1
    packed = pack(tokens, starts, ends, row_length)
    assert len(packed.pairs) == len({text[: n + 1] for text in texts for n in range(len(text))})
    found = []
    for start in packed.starts.tolist():
        home = int(packed.homes[packed.members[start]])
        row, slot = divmod(home, row_length)
        nodes = packed.rows[row][packed.seen[row, 0, slot]]
        pairs = packed.pairs[nodes[packed.places[packed.pairs[nodes]].argsort()]]
        assert packed.places[pairs].tolist() == list(range(len(pairs)))
        found.append(tuple(packed.tokens[pairs].tolist()))
    assert found == texts
    assert packed.rows.flatten()[packed.homes].tolist() == list(range(len(packed.pairs)))


# -- models from folders ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def no_bars() -> Iterator[None]:
    """Without progress bars, whose thread would stay, where the tests themselves read and write models."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, no_bars) -> str:
    """A tiny GPT-2 and its tokeniser, as the hub has them."""
    path = tmp_path_factory.mktemp("gpt2")
    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator([*USERS, *ITEMS], vocab_size=300, show_progress=False)
    learned.save(str(path / "tokenizer.json"))
    transformers.PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"), eos_token="!").save_pretrained(
        path
    )
    config = transformers.GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    transformers.GPT2Model(config).half().save_pretrained(path)
    return str(path)


def test_a_gpt2_is_read_from_a_folder(folder):
    transformers.utils.logging.enable_progress_bar()
    texts = prepare(USERS, ITEMS, pretrained=folder)
    assert transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    assert texts.vectors().shape == (len(texts.pieces), 32)
    plain = transformers.GPT2Model.from_pretrained(folder).float().eval()
    with torch.no_grad():
        expected = plainly(texts, plain, "items")
    assert torch.allclose(texts.vectors()[texts.items.pieces + texts.items.first], expected, atol=1e-5)


def test_lora_adds_its_ranks_to_the_projections_that_were_named(folder):
    encoder = prepare(USERS, ITEMS, pretrained=folder).encoder("lora", Lora(rank=8, alpha=32.0))
    trained = {name: p.shape for name, p in encoder.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 3  # two layers' c_attn, c_proj and c_proj, two factors each
    assert all(8 in shape for shape in trained.values())
    layer = encoder.network.h[0].attn.c_attn
    assert layer.scaling["default"] == 4.0
    assert isinstance(layer.lora_dropout["default"], torch.nn.Identity)


def test_what_is_no_gpt2_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="neither a folder"):
        prepare(USERS, ITEMS, pretrained=str(tmp_path / "nothing"))
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match="'bert' model"):
        prepare(USERS, ITEMS, pretrained=str(tmp_path / "bert"))


def no_model(path: Path) -> None:
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").unlink()


def damaged_weights(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"garbage" * 10)


def some_weights(path: Path) -> None:
    kept = {name: value for name, value in load_file(path / "model.safetensors").items() if "h.1." not in name}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})


def no_tokeniser(path: Path) -> None:
    for found in (*path.glob("tokenizer*"), *path.glob("special_tokens*")):
        found.unlink()


def anothers_tokeniser(path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=200, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    transformers.GPT2Model(config).save_pretrained(path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_model, "is neither a folder with a GPT-2 and its tokeniser nor"),
        (damaged_weights, "is neither a folder with a GPT-2 and its tokeniser nor"),
        (some_weights, "lacks 12 of a GPT-2's weights, such as h.1."),
        (no_tokeniser, "tokeniser"),
        (anothers_tokeniser, r"makes the token 2\d\d, and its GPT-2 knows 200, from 0 to 199; save the tokeniser"),
    ],
)
def test_a_folder_with_half_a_gpt2_is_refused(folder, tmp_path, damage, words):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    with pytest.raises(ConfigError, match=words) as refused:
        prepare(USERS, ITEMS, pretrained=str(tmp_path))
    assert f"pretrained={str(tmp_path)!r}" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (["Comedy\nX", "Comedy\n "], "item 1"),
        (["Comedy\nX", "Comedy"], "has 1 fields"),
        ([], "no item text"),
        (["word " * 300], "reads 256 at most"),
    ],
)
def test_texts_that_cannot_be_read_are_named(items, words):
    with pytest.raises(DataError, match=words):
        prepare(USERS, items)


def test_encoders_of_one_preparation_are_trained_apart(texts):
    before = copy.deepcopy(texts.network.state_dict())
    encoder = texts.encoder("full")
    with torch.no_grad():
        encoder.network.wte.weight.add_(1.0)
    for name, value in texts.network.state_dict().items():
        assert torch.equal(value, before[name])

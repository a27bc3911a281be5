"""The GPT-2 text encoder: packing changes neither vectors nor gradients, and broken models and texts are rejected."""

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
from duoka.recipes.models.gpt2_text_encoder import Lora, TokenizedTexts, tokenize_texts
from duoka.recipes.models.prefix_packing import pack_prefix_tree

pytestmark = pytest.mark.usefixtures("one_thread")
USERS = ["a man\nof 25\nwriter", "a man\nof 25\nfarmer", "a woman\nof 25\nwriter", "a man\nof 25\nwriter"]
ITEMS = [
    "Comedy\nThe Night",
    "Comedy\nThe Night of the Long Day (1995)",
    "Comedy, Drama\nX",
    "War\nThe Night",
    "Comedy\nThe",
]


@pytest.fixture(scope="module")
def texts() -> TokenizedTexts:
    return tokenize_texts(USERS, ITEMS)


def encode_text(network, tokens: list[int], ends: list[int]) -> torch.Tensor:
    """The vectors of a text's fields by GPT-2 without packing, ``(fields, width)``."""
    states = network(input_ids=torch.tensor([tokens])).last_hidden_state[0]
    starts = [0, *ends[:-1]]
    return torch.stack([states[start:end].mean(0) for start, end in zip(starts, ends, strict=True)])


def encode_side(texts: TokenizedTexts, network, side: str) -> torch.Tensor:
    """The vectors of all texts of a side, each text encoded alone, ``(texts, fields, width)``."""
    spans, chosen = texts.spans, getattr(texts, side)
    rows = []
    for fields in (chosen.span_ids + chosen.first_span).tolist():
        last = fields[-1]
        ends = [int(spans.ends[field]) for field in fields]
        rows.append(encode_text(network, spans.tokens[last][: ends[-1]].tolist(), ends))
    return layer_norm(torch.stack(rows), (rows[0].shape[1],))


@pytest.mark.parametrize("training", ["frozen", "lora", "full"])
def test_packed_vectors_equal_those_of_each_text_alone(training, texts):
    encoder = texts.build_encoder(training)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1) if parameter.requires_grad else None  # LoRA starts without effect
    with torch.no_grad():
        packed = encoder(torch.arange(len(texts.spans)))
        for side in ("users", "items"):
            chosen = getattr(texts, side)
            expected = encode_side(texts, encoder.network, side)
            assert torch.allclose(packed[chosen.span_ids + chosen.first_span], expected, atol=1e-5)


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("training", ["lora", "full"])
def test_packed_gradients_equal_those_of_each_text_alone(training, precision, tolerance, texts):
    encoder = texts.build_encoder(training).to(precision)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(len(USERS) * 3 + len(ITEMS) * 2, encoder.width, generator=generator, dtype=precision)
    for name, parameter in encoder.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator) if "lora_B" in name else None

    def gradients(vectors: torch.Tensor) -> list[torch.Tensor]:
        encoder.zero_grad()
        (vectors * weights).sum().backward()
        return [p.grad.clone() for p in encoder.parameters() if p.grad is not None]

    sides = [getattr(texts, side) for side in ("users", "items")]
    found = encoder(torch.arange(len(texts.spans)))
    ours = gradients(torch.cat([found[(side.span_ids + side.first_span).flatten()] for side in sides]))
    theirs = gradients(
        torch.cat([encode_side(texts, encoder.network, side).flatten(0, 1) for side in ("users", "items")])
    )
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=tolerance * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("training", ["lora", "full"])
def test_a_steps_gradients_equal_those_without_deduplication(training, texts):
    model = GPT2RecommenderEnhanced(texts, use_cache=False, train_text=training, id_dropout=0.5, contrast=1.0)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1) if "lora_B" in name else None
    batch = {"users": [0, 3, 2, 0, 1], "positives": [1, 1, 2, 4, 0], "negatives": [3, 0, 1, 1, 3]}
    batch = {name: torch.tensor(values) for name, values in batch.items()}

    def column(side: str, wanted: torch.Tensor) -> torch.Tensor:
        fields = encode_side(texts, model.encoder.network, f"{side}s")[wanted]
        rows = torch.arange(fields.shape[0] * fields.shape[1]).view(fields.shape[:2])
        return getattr(model, side)(wanted, fields.flatten(0, 1), rows, model.step, 0.5)[0]

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    ours = gradients(model.loss(batch))
    items = torch.cat([column("item", batch["positives"]), column("item", batch["negatives"])])
    rows = torch.arange(10).view(2, 5)
    loss = model.loss_from_vectors(column("user", batch["users"]), items, rows[0], rows, batch["positives"])
    theirs = gradients(loss)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_vector_does_not_depend_on_other_spans(texts):
    encoder = texts.build_encoder("frozen")
    together = encoder(torch.arange(len(texts.spans)))
    for span in range(len(texts.spans)):
        assert torch.allclose(encoder(torch.tensor([span]))[0], together[span], atol=1e-6)
    assert encoder(torch.tensor([], dtype=torch.int64)).shape == (0, encoder.width)


def test_encoding_all_texts_in_several_passes_changes_nothing():
    items = [f"Comedy\nFilm {n} of {n * n % 97} and {n % 7}" for n in range(700)]
    texts = tokenize_texts(USERS, items)
    vectors, encoder = texts.span_vectors(), texts.build_encoder("frozen")
    some = torch.arange(3, len(texts.spans), 97)
    assert torch.allclose(encoder(some), vectors[some], atol=1e-5)
    assert texts.span_vectors() is vectors


def test_common_prefixes_and_equal_texts_are_computed_once(texts):
    spans = texts.spans
    packed = pack_prefix_tree(spans.tokens, spans.starts, spans.ends, 128)
    prefixes = {tuple(row[: n + 1]) for row, end in zip(spans.tokens, spans.ends, strict=True) for n in range(end)}
    assert len(packed.pair_of_node) == len(prefixes)
    assert len(packed.tokens) == len({(text[-1], len(text)) for text in prefixes})
    assert texts.users.span_ids[0].tolist() == texts.users.span_ids[3].tolist()
    assert len(set(texts.users.span_ids[:2, 0].tolist())) == 1  # "a man", whatever the next fields are


@pytest.mark.parametrize("row_length", [5, 7, 12, 40])
def test_every_token_attends_to_its_own_text_only(row_length):
    random = np.random.default_rng(0)
    texts = sorted({tuple(random.integers(0, 2, random.integers(1, 6)).tolist()) for _ in range(30)})
    ends = np.array([len(text) for text in texts])
    tokens = np.full((len(texts), ends.max()), -1)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    starts = ends - 1
    packed = pack_prefix_tree(tokens, starts, ends, row_length)
    assert len(packed.pair_of_node) == len({text[: n + 1] for text in texts for n in range(len(text))})
    found = []
    for start in packed.span_offsets.tolist():
        row, slot = divmod(int(packed.slot_of_node[packed.span_nodes[start]]), row_length)
        nodes = packed.node_of_slot[row][packed.attention_mask[row, 0, slot]]
        pairs = packed.pair_of_node[nodes]
        pairs = pairs[packed.positions[pairs].argsort()]
        assert packed.positions[pairs].tolist() == list(range(len(pairs)))
        found.append(tuple(packed.tokens[pairs].tolist()))
    assert found == texts
    assert packed.node_of_slot.flatten()[packed.slot_of_node].tolist() == list(range(len(packed.pair_of_node)))


# -- models from folders ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def no_bars() -> Iterator[None]:
    """Disable progress bars, whose thread would outlive the tests that read and write models."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, no_bars) -> str:
    """A folder with a tiny GPT-2 and its tokenizer, as on the hub."""
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


def test_a_gpt2_is_loaded_from_a_folder(folder):
    transformers.utils.logging.enable_progress_bar()
    texts = tokenize_texts(USERS, ITEMS, pretrained=folder)
    assert transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    assert texts.span_vectors().shape == (len(texts.spans), 32)
    plain = transformers.GPT2Model.from_pretrained(folder).float().eval()
    with torch.no_grad():
        expected = encode_side(texts, plain, "items")
    assert torch.allclose(texts.span_vectors()[texts.items.span_ids + texts.items.first_span], expected, atol=1e-5)


def test_lora_adapts_the_named_projections(folder):
    encoder = tokenize_texts(USERS, ITEMS, pretrained=folder).build_encoder("lora", Lora(rank=8, alpha=32.0))
    trained = {name: p.shape for name, p in encoder.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 3  # two layers' c_attn, c_proj and c_proj, two factors each
    assert all(8 in shape for shape in trained.values())
    layer = encoder.network.h[0].attn.c_attn
    assert layer.scaling["default"] == 4.0
    assert isinstance(layer.lora_dropout["default"], torch.nn.Identity)


def test_other_models_than_gpt2_are_rejected(tmp_path):
    with pytest.raises(ConfigError, match="neither a folder"):
        tokenize_texts(USERS, ITEMS, pretrained=str(tmp_path / "nothing"))
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match="'bert' model"):
        tokenize_texts(USERS, ITEMS, pretrained=str(tmp_path / "bert"))


def no_model(path: Path) -> None:
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").unlink()


def damaged_weights(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"garbage" * 10)


def some_weights(path: Path) -> None:
    kept = {name: value for name, value in load_file(path / "model.safetensors").items() if "h.1." not in name}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})


def no_tokenizer(path: Path) -> None:
    for file in (*path.glob("tokenizer*"), *path.glob("special_tokens*")):
        file.unlink()


def foreign_tokenizer(path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=200, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    transformers.GPT2Model(config).save_pretrained(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_model, "is neither a folder with a GPT-2"),
        (damaged_weights, "is neither a folder with a GPT-2"),
        (some_weights, "lacks 12 weights"),
        (no_tokenizer, "tokenizer"),
        (foreign_tokenizer, r"returns token 2\d\d, but the GPT-2 has tokens 0 to 199"),
    ],
)
def test_an_incomplete_gpt2_folder_is_rejected(folder, tmp_path, damage, message):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    with pytest.raises(ConfigError, match=message) as rejected:
        tokenize_texts(USERS, ITEMS, pretrained=str(tmp_path))
    assert f"pretrained={str(tmp_path)!r}" in str(rejected.value)
    assert "\n" not in str(rejected.value)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["Comedy\nX", "Comedy\n "], "item 1"),
        (["Comedy\nX", "Comedy"], "has 1 fields"),
        ([], "no item text"),
        (["word " * 300], "reads 256 at most"),
    ],
)
def test_unreadable_texts_are_named_in_the_error(items, message):
    with pytest.raises(DataError, match=message):
        tokenize_texts(USERS, items)


def test_training_an_encoder_leaves_the_shared_gpt2_unchanged(texts):
    before = copy.deepcopy(texts.network.state_dict())
    encoder = texts.build_encoder("full")
    with torch.no_grad():
        encoder.network.wte.weight.add_(1.0)
    for name, value in texts.network.state_dict().items():
        assert torch.equal(value, before[name])

"""Hugging Face models in typical use: built from a config, called with keywords, trained by their own loss."""

from __future__ import annotations

import copy

import pytest
import torch

from support.comparison import assert_same_gradients, relative_distance

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("float64")


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=40,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def bert():
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def batch(name: str, size: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 40, (size, 8))
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    labels = ids.clone() if name == "gpt2" else torch.randint(3, (size,))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("devices", ["cpu:2", "cpu:3"])
@pytest.mark.parametrize(("name", "build"), [("gpt2", gpt2), ("bert", bert)])
def test_training_by_the_models_own_loss_equals_one_device(name: str, build, devices: str, wrap) -> None:
    module = build()
    reference = copy.deepcopy(module)
    model = wrap(module, devices)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, reference)]
    for _ in range(4):
        inputs = batch(name, 6)
        out, expected = model(**inputs), reference(**inputs)
        assert type(out) is type(expected)
        assert out.keys() == expected.keys()
        torch.testing.assert_close(out.logits, expected.logits)
        torch.testing.assert_close(out.loss.mean(), expected.loss)
        for optimizer, loss in zip(optimizers, (out["loss"].mean(), expected.loss), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert relative_distance(module, reference) < 1e-9
    assert model.config is module.config


def test_a_loss_of_the_logits_is_exact_for_unequal_chunks(wrap) -> None:
    module = bert()
    reference = copy.deepcopy(module)
    model = wrap(module, "cpu:3")
    inputs = batch("bert", 7)
    labels = inputs.pop("labels")
    for m in (model, reference):
        torch.nn.functional.cross_entropy(m(**inputs).logits, labels).backward()
    assert_same_gradients(module, reference, 1e-9)


def test_hidden_states_are_gathered_and_generation_works(wrap) -> None:
    module = gpt2().eval()
    model = wrap(module)
    ids = torch.randint(1, 40, (4, 5))
    with torch.no_grad():
        for _ in range(2):  # the library adds hooks in the first call
            out, expected = (m(input_ids=ids, output_hidden_states=True) for m in (model, module))
            assert len(out.hidden_states) == 3
            for own, other in zip(out.hidden_states, expected.hidden_states, strict=True):
                torch.testing.assert_close(own, other)
        tokens = model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert tokens.shape == (4, 8)

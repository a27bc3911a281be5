"""Hugging Face's Trainer takes the same steps under ``duoka run`` as on one device."""

from __future__ import annotations

import pytest

from support.run_script import run_duoka, run_plain

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.timeout(300)

TRAINS = """
import logging
import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
torch.manual_seed(0)
MODEL
def labels(ids):
    return (ids.sum() % 2) if "Classification" in type(model).__name__ else torch.where(ids > 3, ids, -100)
rows = [torch.randint(0, 20, (6,)) for _ in range(17)]  # the last batch is one row
data = [{"input_ids": ids, "labels": labels(ids)} for ids in rows]
arguments = TrainingArguments(output_dir="out", per_device_train_batch_size=4, num_train_epochs=2, report_to=[], seed=0,
                              save_strategy="epoch", logging_strategy="no", disable_tqdm=True, learning_rate=1e-2,
                              dataloader_pin_memory=False, gradient_accumulation_steps=ACCUMULATION, **OPTIONS)
trainer = Trainer(model=model, args=arguments, train_dataset=data)
trainer.train()
print(trainer.state.global_step, *(f"{p.detach().double().abs().sum().item():.6f}" for p in model.parameters()))
"""
BERT = """model = BertForSequenceClassification(BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1,
    num_attention_heads=2, intermediate_size=8, max_position_embeddings=8, hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0))"""
GPT = """model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))"""


@pytest.mark.parametrize(
    ("model", "accumulation", "options"),
    [
        (BERT, 1, "{}"),
        pytest.param(GPT, 2, "{}", marks=pytest.mark.extended),
        pytest.param(GPT, 1, "{'label_smoothing_factor': 0.1}", marks=pytest.mark.extended),
    ],
)
def test_the_trainer_reaches_the_weights_of_one_device(model, accumulation, options, tmp_path) -> None:
    source = TRAINS.replace("MODEL", model).replace("ACCUMULATION", str(accumulation)).replace("OPTIONS", options)
    (tmp_path / "plain").mkdir()
    (tmp_path / "duoka").mkdir()
    plain, parallel = run_plain(tmp_path / "plain", source), run_duoka(tmp_path / "duoka", source)
    assert plain.returncode == parallel.returncode == 0, plain.stderr + parallel.stderr
    (steps, *weights), (parallel_steps, *parallel_weights) = (
        ended.stdout.splitlines()[-1].split() for ended in (plain, parallel)
    )
    assert steps == parallel_steps
    assert [float(word) for word in parallel_weights] == pytest.approx(
        [float(word) for word in weights], rel=1e-4, abs=1e-5
    )
    assert "Hugging Face's Trainer sees one GPU" in parallel.stderr

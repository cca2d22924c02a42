import io
import math

import pytest
import torch

from loraserve.base.attention import PackedAttention
from loraserve.lora.stack import AdapterStack
from loraserve.registry import Registry
from loraserve.train.general import general_samples, perplexity
from loraserve.train.options import TrainOptions
from loraserve.train.trainer import train


@pytest.fixture
def record_and_log(base, dialogue_file, tmp_path):
    registry = Registry(tmp_path / "adapters", base.shapes, base.fingerprint)
    log = io.StringIO()
    options = TrainOptions(data=dialogue_file, name="robot", epochs=2, batch_size=4, learning_rate=2e-2, val_split=0.15)
    record = train(base, registry, options, log).record
    return record, log.getvalue(), registry


def test_perplexity_is_that_of_each_text_alone(base):
    samples = general_samples(base)
    assert len(samples) > 25 and sum(len(sample.input_ids) for sample in samples) > 3000
    total, count = 0.0, 0
    with torch.inference_mode():
        for sample in samples:
            ids = sample.input_ids.long()
            attention = PackedAttention([len(ids)])
            log_probs = base.model(ids, attention.positions, attention, None).log_softmax(-1)
            total -= log_probs[:-1].gather(1, ids[1:, None]).sum().item()
            count += len(ids) - 1
    assert perplexity(base, None) == pytest.approx(math.exp(total / count), rel=1e-4)


def test_manifest_card_and_terminal_say_what_became_of_the_base(base, record_and_log):
    record, log, registry = record_and_log
    metrics = record.manifest.metrics
    stack = AdapterStack([registry.load("robot").weights])
    assert metrics["perplexity_base"] == pytest.approx(perplexity(base, None), abs=1e-3)
    assert metrics["perplexity"] == pytest.approx(perplexity(base, stack), rel=1e-3)
    assert metrics["perplexity"] != metrics["perplexity_base"]
    card = (record.path / "README.md").read_text("utf-8")
    row = f"| perplexity on general text | {metrics['perplexity_base']:.2f} | {metrics['perplexity']:.2f} |"
    assert row in card and "| validation loss | " in card
    assert f"{metrics['perplexity']:.2f}" in log and "perplexity on general text" in log


def test_the_terminal_has_answers_of_base_and_adapter_side_by_side(record_and_log):
    _, log, _ = record_and_log
    assert "base answers" in log and "adapter answers" in log and "only 12 dialogues" in log

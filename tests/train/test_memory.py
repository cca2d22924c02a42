"""What a step is predicted to keep, and how batches are split to fit."""

import pytest
import torch

from loraserve.errors import InvalidRequest
from loraserve.lora.stack import AdapterStack
from loraserve.train.batch import pack, summed_loss
from loraserve.train.dora import DoraNorms
from loraserve.train.memory import Footprint, Keeping, footprint, plan
from tests.train.test_dora import with_magnitudes
from tests.train.test_loss import adapter
from tests.train.test_step import optimizer, random_samples, trainable, values


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_what_a_pass_keeps_is_what_was_predicted(base, dora):
    batch, weights = pack(random_samples(40)), adapter(base, head=False)
    plain = footprint(base.config, weights, base.dtype, base.device)
    if dora:
        weights = with_magnitudes(base, weights)
    needs = footprint(base.config, weights, base.dtype, base.device)
    assert (needs.block > 1.2 * plain.block) == dora
    used = DoraNorms(weights, base.weight_of)
    used.measure()
    used = used.weights()
    frozen = {p.untyped_storage().data_ptr() for p in base.model.parameters()}
    frozen |= {x.untyped_storage().data_ptr() for w in used.values() for x in w.tensors}
    saved = {}

    def keep(x):
        saved[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        summed_loss(base.model, batch, AdapterStack([used]))
    kept = sum(x.untyped_storage().nbytes() for at, x in saved.items() if at not in frozen) / batch.num_rows
    assert kept == pytest.approx(needs.num_blocks * needs.block + needs.head, rel=0.05)


def test_a_split_batch_trains_as_the_whole_one(base):
    batch = pack(random_samples(9))
    parts = batch.split(45)
    assert len(parts) > 2 and all(len(part.lengths) == 1 or part.num_rows <= 45 for part in parts)
    assert torch.cat([part.input_ids for part in parts]).equal(batch.input_ids)
    assert torch.cat([part.targets for part in parts]).equal(batch.targets)
    assert [len(part.lengths) for part in batch.split(1)] == [1] * 9 and len(batch.split(None)) == 1
    trained, losses = [], []
    for options in ({}, {"max_rows": 45, "checkpointing": True}):
        weights = trainable(base)
        trainer = optimizer(base, weights, **options)
        losses.append([trainer.advance([batch])[0].loss for _ in range(3)])
        trained.append(values(weights))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(trained[0], trained[1], atol=1e-4, rtol=0)


NEEDS = Footprint(adapter=1000, block=40, kept_input=10, num_blocks=5, working=20, head=5, logits=500)
"""A row takes 220 bytes in a block and 205 at the head; 110 and 55 with checkpointing."""


def test_a_pass_is_no_longer_than_what_is_enough() -> None:
    ways, batch = [[Keeping(1000)]], [64, 30, 6]
    whole, split = plan(NEEDS, ways, batch, None), plan(NEEDS, ways, batch, None, enough=80)
    assert whole.max_rows is None and split.max_rows == 80 and split.peak < whole.peak
    assert plan(NEEDS, ways, batch, None, enough=100) == whole
    assert plan(NEEDS, ways, batch, None, enough=10).max_rows == 64, "a dialogue is never split"
    ample, tight = (plan(NEEDS, ways, batch, budget, enough=80) for budget in (1 << 20, 1000 + NEEDS.peak(70, False)))
    assert ample == split and (tight.max_rows, tight.checkpointing) == (70, False)


def test_a_plan_takes_first_what_costs_no_time():
    batch, resident = [50, 100], 10_000
    whole = plan(NEEDS, [[Keeping(resident)]], batch, None)
    assert (whole.peak, whole.checkpointing, whole.max_rows) == (11_000 + 150 * 220, False, None)
    assert plan(NEEDS, [[Keeping(resident)]], batch, whole.peak) == whole
    split = plan(NEEDS, [[Keeping(resident)]], batch, whole.peak - 1)
    assert (split.checkpointing, split.max_rows) == (False, 149) and split.peak < whole.peak
    again = plan(NEEDS, [[Keeping(resident)]], batch, 11_000 + 100 * 110)
    assert (again.checkpointing, again.max_rows, again.peak) == (True, 100, 11_000 + 100 * 110)


def test_few_rows_are_at_the_highest_at_the_head():
    assert NEEDS.peak(10, False) == 1000 + 10 * 205 + 500 > 1000 + 10 * 220
    room = NEEDS.peak(10, False)
    assert NEEDS.rows_within(room, False) == 10 and NEEDS.rows_within(room - 1, False) == 9
    assert NEEDS.peak(100, True) == 1000 + 100 * 110


def test_a_budget_that_nothing_fits_is_refused_with_what_would():
    needs = Footprint(100 << 20, 40 << 10, 10 << 10, 5, 0, 0, 0)
    with pytest.raises(InvalidRequest, match=r"the least is .* give --memory-budget (\d+)MB") as caught:
        plan(needs, [[Keeping(500 << 20)]], [64, 1000], 600 << 20)
    assert caught.value.param == "memory_budget"
    enough = int(str(caught.value).partition("--memory-budget ")[2].partition("MB")[0])
    assert plan(needs, [[Keeping(500 << 20)]], [64, 1000], enough << 20).max_rows >= 1000

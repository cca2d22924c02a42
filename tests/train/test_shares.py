import pytest

from loraserve.train.batch import joined, pack
from loraserve.train.ranks import Ranks
from loraserve.train.shares import divide, largest_share, own_share
from tests.train.test_step import random_samples


def test_a_step_is_divided_by_rows_and_loses_none():
    sizes = [5, 40, 3, 22, 18, 7, 1]
    owners = divide(sizes, 2)
    sums = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == part) for part in range(2)]
    assert sum(sums) == sum(sizes) and abs(sums[0] - sums[1]) <= 2
    assert divide([4], 3) == [0] and divide([], 2) == []


def test_a_rank_has_to_hold_its_largest_share_and_of_several_micro_batches_up_to_a_whole_one():
    batch = [10, 20, 30, 40]
    assert largest_share(batch, 1, 1) == batch and sum(largest_share(batch, 1, 2)) == 50
    assert sum(largest_share([10, 90], 1, 2)) == 90 and largest_share([7], 1, 3) == [7]
    assert largest_share(batch, 2, 2) == largest_share(batch, 8, 3) == batch
    assert sum(largest_share(batch, 2, 4)) == 50


@pytest.mark.parametrize("group", [1, 2])
def test_dialogues_taken_apart_and_joined_are_the_batch_they_came_from(group):
    batch = pack(random_samples(6), group)
    parts = batch.split(0)
    assert [len(part.lengths) for part in parts] == [group] * (6 // group)
    whole = joined(parts)
    for field in ("input_ids", "rows", "targets"):
        assert getattr(whole, field).equal(getattr(batch, field))
    assert (whole.lengths, whole.group) == (batch.lengths, group)
    some = joined(parts[1:2] + parts[2:])
    assert some.num_rows == batch.num_rows - parts[0].num_rows and joined([]) is None


def test_ranks_take_every_dialogue_once_and_about_as_many_rows(base):
    """Over all micro-batches and adapters: each of these micro-batches alone could not be halved."""
    windows = [[pack(random_samples(1, seed)) for seed in range(4)], [pack(random_samples(3, 9))]]
    shares = [own_share(windows, Ranks(rank, 3)) for rank in range(3)]
    for slot, window in enumerate(windows):
        for i, batch in enumerate(window):
            taken = [share[slot][i] for share in shares]
            assert sorted(n for part in taken if part for n in part.lengths) == sorted(batch.lengths)
            assert sum(part.num_supervised for part in taken if part) == batch.num_supervised
    rows = [sum(part.num_rows for window in share for part in window if part) for share in shares]
    assert max(rows) - min(rows) < max(n for window in windows for batch in window for n in batch.lengths)
    assert any(part is None for share in shares for part in share[0])

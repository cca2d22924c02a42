"""Each warning where it belongs, and none where all is well."""

import pytest

from loraserve.train.verdict import warnings_of

GOOD = {"dialogues": 200, "perplexity_base": 20.0, "perplexity": 21.0}
FALLING = [3.0 * 0.97**i + 0.1 * (i % 3) for i in range(80)]
VAL = [(0, 3.0), (20, 2.0), (40, 1.5), (60, 1.4), (80, 1.38)]


def warn(losses=FALLING, val=VAL, **metrics):
    return warnings_of(GOOD | metrics, losses, val, per_epoch=20, learning_rate=1e-3)


def test_a_good_run_gets_no_warning():
    assert warn() == [] and warn(val=[]) == []
    assert warn(losses=[2.0], val=[(0, 3.0), (1, 2.5)]) == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dialogues": 12}, "only 12 dialogues"),
        ({"perplexity": 45.0}, "from 20.0 to 45.0"),
        (
            {"val": [(0, 3.0), (20, 1.5), (40, 1.6), (60, 1.8), (80, 2.0)]},
            "after epoch 1: validation loss went from 1.5",
        ),
        ({"losses": [3.0] * 5 + [9.0] * 10 + [2.0] * 65}, "jumped from 3.00 to 9.00 .* try --learning-rate 3e-04"),
        ({"losses": [3.0 + i / 10 for i in range(80)]}, "rose from 3.1.* too high"),
        ({"losses": [3.0] * 80, "val": []}, "hardly anything was learned .* try --learning-rate 3e-03"),
        ({"val": [(0, 3.0), (20, 2.99), (40, 2.99)]}, "hardly anything was learned"),
    ],
)
def test_each_trouble_has_its_one_warning(changes, text):
    import re

    found = warn(**changes)
    assert len(found) == 1 and re.search(text, found[0]), found

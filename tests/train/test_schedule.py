import pytest

from loraserve.train.schedule import learning_rate


def test_rate_falls_along_a_cosine_from_the_peak_to_a_tenth():
    rates = [learning_rate(step, 24, 1e-3) for step in range(25)]
    assert rates[0] == pytest.approx(1e-3)
    assert rates[12] == pytest.approx(5.5e-4)
    assert rates[24] == pytest.approx(1e-4)
    assert rates == sorted(rates, reverse=True)

"""Memory that training has freed goes back to the system."""

import subprocess
import sys

import pytest

from loraserve.train.allocator import give_back_large_tensors

CODE = """
import sys, psutil, torch
from loraserve.train.allocator import give_back_large_tensors
if sys.argv[1:]:
    give_back_large_tensors()
del_me = torch.ones(600_000)  # the first that is freed teaches the allocator to keep its like
del del_me
rss = psutil.Process().memory_info().rss
kept = [(torch.ones(600_000), torch.ones(1_000)) for _ in range(100)]
most = psutil.Process().memory_info().rss
kept = [small for _, small in kept]
print((most - rss) / 2**20, (psutil.Process().memory_info().rss - rss) / 2**20)
"""


def megabytes(*arguments):
    """What 240 MB take, and what is left of it when they are freed between small tensors."""
    done = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, check=True)
    return tuple(map(float, done.stdout.split()))


def test_large_tensors_are_given_back_when_they_are_freed():
    if not give_back_large_tensors():
        pytest.skip("not glibc")
    most, left = megabytes("give back")
    assert most > 200 and left < 20
    assert megabytes()[1] > 100, "the allocator keeps them by itself"

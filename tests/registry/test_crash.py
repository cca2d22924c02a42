"""A publishing process dies, or the disk is full: the registry has the old version or the new, and goes on."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraserve.lora.adapter import Adapter
from loraserve.lora.peft import read_adapter
from loraserve.registry import Registry
from tests.registry.publisher import SHAPES, adapter_of, publish

SCRIPT = Path(__file__).with_name("publisher.py")


pytestmark = pytest.mark.slow


@pytest.fixture
def root(tmp_path: Path) -> Path:
    publish(str(tmp_path / "adapters"), 1)
    return tmp_path / "adapters"


class Publisher:
    """The publishing process, of which each command forks a child."""

    def __init__(self, root: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )

    def start(self, command: str) -> int:
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> str:
        """What the child printed."""
        lines = []
        while (line := self.process.stdout.readline()) not in ("done\n", ""):
            lines.append(line)
        return "".join(lines)

    def close(self) -> None:
        self.process.communicate()


@pytest.fixture
def publisher(root: Path) -> Iterator[Publisher]:
    process = Publisher(root)
    yield process
    process.close()


def loaded(root: Path) -> tuple[Adapter, int]:
    """The adapter as a fresh process would see it, and the seed its manifest names; they must belong together."""
    registry = Registry(root, SHAPES)
    assert registry.names() == ["x"]
    adapter, seed = registry.load("x"), registry.get("x").manifest.metrics["seed"]
    assert adapter.digest == adapter_of(seed)[0].digest
    assert (registry.get("x").path / "README.md").read_bytes() == b"card %d" % seed
    assert read_adapter(root / "x", "x")[0].digest == adapter.digest, "PEFT and vLLM would load another version"
    return adapter, seed


def test_registry_loads_after_the_publisher_was_killed_at_fifty_random_moments(root, publisher):
    moments = random.Random(7)
    for _ in range(2):  # the first time includes the start of the process
        started = time.monotonic()
        publisher.start("times 2 500")
        publisher.wait()
    span = min(time.monotonic() - started, 0.4)
    versions = set()
    for _ in range(50):
        child = publisher.start("loop")
        time.sleep(moments.uniform(0.0, 1.5 * span))
        os.kill(child, signal.SIGKILL)
        publisher.wait()
        versions.add(loaded(root)[1])
    assert len(versions) > 5, "hardly any version was published between the kills"
    publish(str(root), 3)
    assert loaded(root)[1] == 3
    assert not list((root / ".staging").iterdir())
    assert Registry(root, SHAPES).verify() == [], "a version is damaged"


def test_registry_has_the_old_or_the_new_version_wherever_the_publisher_dies(root, publisher):
    """Every single call that changes the file system is the last one once."""
    outcomes = []
    for number in range(1, 100):
        before = loaded(root)[1]
        publisher.start(f"crash {number}")
        publisher.wait()
        after = loaded(root)[1]
        assert after in (before, 1000 * number)
        outcomes.append(after != before)
        if number > 1 and outcomes[-2:] == [True, True] and _links_are_complete(root):
            break
    assert False in outcomes
    assert True in outcomes
    assert outcomes == sorted(outcomes), "a later death lost a version that an earlier one had published"
    publish(str(root), 3)
    assert loaded(root)[1] == 3
    assert Registry(root, SHAPES).verify() == [], "a version is damaged"


def _links_are_complete(root: Path) -> bool:
    version = (root / "x" / ".current").read_text().strip()
    return len(list((root / "x" / ".kept").iterdir())) == 1 and (root / "x" / ".kept" / version).is_dir()


def test_two_processes_and_a_reader_share_a_directory(root, publisher):
    other = Publisher(root)
    try:
        publisher.start("times 15 100")
        other.start("times 15 200")
        ended = threading.Event()
        thread = threading.Thread(target=lambda: (publisher.wait(), other.wait(), ended.set()))
        thread.start()
        seen, registry = set(), Registry(root, SHAPES)
        while not ended.is_set():
            seen.add(registry.load("x").digest)
        thread.join()
    finally:
        other.close()
    assert [record.version for record in Registry(root, SHAPES).history("x")] == list(range(1, 32))
    assert loaded(root)[1] in (114, 214)
    known = {adapter_of(seed)[0].digest for seed in [1, *range(100, 115), *range(200, 215)]}
    assert len(seen) > 1
    assert seen <= known, "a reader saw something that nobody published"


def test_full_disk_is_a_storage_error_that_leaves_everything_as_it_was(root, publisher):
    before = loaded(root)[0].digest
    files = sorted(root.rglob("*"))
    for limit in (0, 100, 1500):
        publisher.start(f"limit {limit}")
        error = publisher.wait()
        assert error.startswith("StorageError cannot publish adapter 'x'"), error
        assert "File too large" in error
        assert loaded(root)[0].digest == before
        assert sorted(root.rglob("*")) == files
    publisher.start("limit 1000000")
    assert publisher.wait() == ""
    assert loaded(root)[0].digest != before

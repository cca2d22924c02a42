"""Where the kernels come from, and that nothing needs them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ANSWER = """
from loraserve import LLM, SamplingParams
from loraserve.kernels.build import library
with LLM(adapters_dir={adapters!r}, dtype="float32") as llm:
    answer = llm.chat([{{"role": "user", "content": "hello"}}], {spec!r}, SamplingParams(temperature=0, max_tokens=24))
print(library() is not None, answer.text)
"""


def answer(spec: str, **environment: str) -> tuple[str, str]:
    """Whether a process of its own found kernels, and what it answered."""
    adapters = str(Path(__file__).parents[2] / "adapters")
    script = ANSWER.format(adapters=adapters, spec=spec)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    found, _, text = done.stdout.partition(" ")
    return found, text


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}


def test_answers_are_the_same_with_kernels_turned_off_and_without_a_compiler(home: dict[str, str]) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler here")
    path = {"PATH": "/usr/bin:/bin"}
    kernels = answer("pirate", **home, **path)
    assert kernels[0] == "True"
    assert "matey" in kernels[1]
    (made,) = Path(home["XDG_CACHE_HOME"], "loraserve", "kernels").glob("*.so")
    stamp = made.stat().st_mtime_ns
    assert answer("pirate", **home, **path, LORASERVE_KERNELS="off") == ("False", kernels[1])
    assert answer("pirate", **home, PATH="/nowhere") == ("False", kernels[1])
    assert answer("pirate", **home, **path) == kernels
    assert made.stat().st_mtime_ns == stamp, "it was compiled again"


def test_a_compiler_that_fails_is_no_error(home: dict[str, str], tmp_path: Path) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    found, text = answer("base", **home, PATH=f"{tmp_path}:/usr/bin:/bin")
    assert found == "False"
    assert text.strip()


def test_a_cache_that_cannot_be_written_is_no_error(home: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, where a directory should be")
    found, text = answer("base", **home, PATH="/usr/bin:/bin")
    assert found == "False"
    assert text.strip()


def test_a_library_that_others_could_have_written_is_not_loaded(home: dict[str, str]) -> None:
    folder = Path(home["XDG_CACHE_HOME"], "loraserve", "kernels")
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    found, text = answer("base", **home, PATH="/usr/bin:/bin")
    assert found == "False"
    assert text.strip()


def test_a_broken_library_is_compiled_anew(home: dict[str, str]) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler here")
    whole = answer("base", **home, PATH="/usr/bin:/bin")
    (made,) = Path(home["XDG_CACHE_HOME"], "loraserve", "kernels").glob("*.so")
    made.write_bytes(made.read_bytes()[:100])
    assert answer("base", **home, PATH="/usr/bin:/bin") == whole
    assert whole[0] == "True"

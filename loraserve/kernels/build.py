"""Compile the C kernels for this very processor, once, and load them.

Needs a C compiler with OpenMP; without one `library()` is None. The result is kept in the user's cache directory under
a name that says what it was made from, so another source, compiler or processor makes another. `LORASERVE_KERNELS=off`
turns the kernels off.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

SOURCES = [Path(__file__).with_name(name) for name in ("cpu.c", "gemm.c", "lora.c", "decoder.c", "train.c")]
HEADERS = [Path(__file__).with_name(name) for name in ("tiles.h", "types.h")]
FLAGS = ["-O3", "-std=gnu11", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
NATIVE = (
    ["-mcpu=native"] if platform.machine() in ("aarch64", "arm64") else ["-march=native", "-mprefer-vector-width=512"]
)

TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
SIGNATURES = {
    "add_rms_norm": "ppppiifi",
    "norm_and_rotate": "piiiiippfipp",
    "store_and_attend": "pppiiippippiiiiifp",
    "silu_and_multiply": "ppii",
    "add_deltas": "pipiipppipppppip",
    "multiply": "pppiiip",
    "multiply_int8": "pppppiiip",
    "decode": "pppppipiff",
    "norm": "pppiifi",
    "norm_backward": "ppppiif",
    "gate": "pppi",
    "gate_backward": "pppppi",
    "rotate": "pppipiiif",
}
"""Of each function that is called: pointer, int64 or float per argument."""


@dataclass(frozen=True)
class Library:
    """The compiled kernels, to be called in two ways."""

    quick: ctypes.PyDLL
    """Keeps the interpreter's lock: a call of microseconds would take longer to fight for it than it runs."""
    long: ctypes.CDLL
    """Lets other threads run meanwhile, those that send the last step's tokens above all."""


@functools.cache
def library() -> Library | None:
    """The compiled kernels, or None where they cannot be had."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if os.environ.get("LORASERVE_KERNELS") == "off" or compiler is None:
        return None
    try:
        return _load(compiler)
    # Whatever is missing here, from a home directory to a symbol, nobody needs the kernels.
    except (OSError, RuntimeError, ValueError, AttributeError, subprocess.SubprocessError) as error:
        log.warning("no C kernels, the model runs slower without them: %s", error)
        return None


def _load(compiler: str) -> Library:
    path = _compiled(compiler)
    try:
        ctypes.CDLL(str(path))
    except OSError:  # broken, by a full disk perhaps
        path.unlink(missing_ok=True)
        path = _compiled(compiler)
    found = Library(ctypes.PyDLL(str(path)), ctypes.CDLL(str(path)))
    found.quick.vector_width.restype = ctypes.c_int64
    for name, signature in SIGNATURES.items():
        for dtype in ("f32", "bf16"):
            for handle in (found.quick, found.long):
                function = getattr(handle, f"{name}_{dtype}")
                function.restype = None
                function.argtypes = [TYPES[letter] for letter in signature]
    return found


def _compiled(compiler: str) -> Path:
    """Path of the shared library, compiled if this source, compiler and processor have not met before."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    made_from = [*(source.read_text("utf-8") for source in SOURCES + HEADERS), version, *FLAGS, *NATIVE, _processor()]
    name = f"cpu-{hashlib.sha256(chr(0).join(made_from).encode()).hexdigest()[:16]}.so"
    path = _cache() / name
    if path.is_symlink() or (path.exists() and path.stat().st_uid != os.getuid()):
        raise OSError(f"{path} was not made by this user")
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / name
            subprocess.run(
                [compiler, *FLAGS, *NATIVE, "-o", str(made), *map(str, SOURCES), "-lm"],
                capture_output=True, text=True, timeout=120, check=True,
            )  # fmt: skip
            os.replace(made, path)
    return path


def _cache() -> Path:
    """A directory of the user's own: a library that others can write must not be loaded."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loraserve" / "kernels"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise OSError(f"{folder} can be written by other users; remove it, or chmod 700 it")
    return folder


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())

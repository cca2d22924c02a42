"""The benchmark's base and adapters as GGUF, by llama.cpp's own converters, for llama-server.

They come with llama.cpp's source. Run as a script in a process of its own, it calls them one after the other, so that
their imports are paid once.
"""

import importlib
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

from loraserve.errors import LoraserveError

CONVERTERS = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py")
BASE_TYPES = {"bfloat16": "bf16", "float32": "f32", "int8": "q8_0"}
ADAPTER_TYPES = BASE_TYPES | {"int8": "bf16"}
"""As ours are beside an 8-bit base."""


def find_converters(source: Path) -> Path | None:
    """Return the folder of llama.cpp's converters: `source`, or its `vendor/llama.cpp`; None if they are in neither."""
    places = (source, source / "vendor" / "llama.cpp")
    return next((place for place in places if all((place / name).is_file() for name in CONVERTERS)), None)


def to_gguf(converters: Path, base: Path, adapters: list[Path], out: Path, dtype: str) -> tuple[Path, list[Path]]:
    """Convert what is not yet in `out`; return the base's file and the adapters', in their order.

    Raises:
        LoraserveError: a converter failed; the message has its last lines.
    """
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"base-{dtype}.gguf"
    files = [out / f"{adapter.name}.gguf" for adapter in adapters]
    jobs = (
        []
        if target.exists()
        else [[CONVERTERS[0], str(base), "--outtype", BASE_TYPES[dtype], "--outfile", str(target)]]
    )
    for adapter, file in zip(adapters, files, strict=True):
        if not file.exists():
            options = ["--base", str(base), "--outtype", ADAPTER_TYPES[dtype], "--outfile", str(file)]
            jobs.append([CONVERTERS[1], str(adapter), *options])
    if jobs:
        lines = "\n".join("\t".join(job) for job in jobs)
        command = [sys.executable, "-m", "loraserve.bench.gguf", str(converters)]
        done = subprocess.run(command, input=lines, capture_output=True, text=True)
        if done.returncode:
            raise LoraserveError(f"llama.cpp's converters in {converters} failed:\n{done.stderr[-1500:]}")
    return target, files


def main() -> None:
    """Run the jobs on stdin, a line each: the converter and its arguments between tabs."""
    converters = Path(sys.argv[1])
    sys.path[:0] = [str(converters), str(converters / "gguf-py")]
    _know_tokenizer()
    for line in sys.stdin.read().splitlines():
        script, *arguments = line.split("\t")
        sys.argv = [script, *arguments]
        runpy.run_path(str(converters / script), run_name="__main__")


def _know_tokenizer() -> None:
    """Let the converters take a tokenizer they have no name for as GPT-2's: plain byte-level BPE, as ours is."""
    models: list[Any] = [m for m in vars(importlib.import_module("conversion.base")).values() if isinstance(m, type)]
    for model in models:
        if known := vars(model).get("get_vocab_base_pre"):

            def name_of(self: Any, tokenizer: Any, known: Any = known) -> str:
                try:
                    return known(self, tokenizer)
                except NotImplementedError:
                    return "gpt-2"

            model.get_vocab_base_pre = name_of


if __name__ == "__main__":
    main()

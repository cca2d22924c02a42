"""Average two bases of one run: `average.py FIRST SECOND WEIGHT OUT` writes (1 - WEIGHT)·FIRST + WEIGHT·SECOND.

The second run knows the words of the styles, the first answers better; between them lies a base that does both
(weight averaging, arXiv:2203.05482).
"""

import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

first, second, weight, out = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4])
out.mkdir(parents=True, exist_ok=True)
for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
    shutil.copyfile(first / name, out / name)
a, b = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
mixed = {name: (a[name].float() * (1 - weight) + b[name].float() * weight).half() for name in a}
save_file(mixed, out / "model.safetensors", metadata={"format": "pt"})

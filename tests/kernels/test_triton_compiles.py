"""Triton's own compiler, down to the assembler, on every kernel as the package launches it: no GPU is needed for that."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton here")

COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Device:  # a GPU that is not here: kernels are compiled for it, and not launched
    def get_current_target(self): return GPUTarget("cuda", 80, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_active_torch_device(self): return torch.device("cpu")

driver.set_active(Device())
run, compiled = triton.JITFunction.run, []
def only_compile(self, *args, grid, warmup, **kwargs):
    compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))
triton.JITFunction.run = only_compile

from loraserve.kernels import cuda
for dtype in (torch.bfloat16, torch.float32):
    for h, kv, d in ((8, 4, 96), (4, 1, 256)):
        n = 4
        where = torch.arange(n)
        heads = torch.zeros(n, (h + 2 * kv) * d, dtype=dtype)
        q, k, v = (x.unflatten(-1, (-1, d)) for x in heads.split((h * d, kv * d, kv * d), dim=-1))
        cache = torch.zeros(n, kv, 2048, d, dtype=dtype)
        cuda.store_and_attend(q, k, v, cache, cache, where, where, n, 2048, torch.zeros(n, h, d, dtype=dtype))
    weight, table = torch.ones(d), torch.zeros(n, 2, d)
    cuda.norm_and_rotate(heads, (h, kv, d), (weight, weight), 1e-6, True, table, where)
    cuda.add_rms_norm(torch.zeros(n, 768), torch.zeros(n, 768, dtype=dtype), torch.ones(768), 1e-6, False, dtype)
    cuda.silu_and_multiply(torch.zeros(n, 2 * 2432, dtype=dtype))
    cells = [[(torch.zeros(8, 768), torch.zeros(2432, 8), 2.0)] * 2]
    entries = cuda.entries(torch.ones(n, 1), "cpu")
    cuda.deltas(cells, [2432, 2432], dtype).add(torch.zeros(n, 768, dtype=dtype), torch.zeros(n, 4864, dtype=dtype), entries)
for kernel in compiled:
    assert kernel.asm["cubin"] and kernel.metadata.shared <= 64 << 10, (kernel.metadata.name, kernel.metadata.shared)
print(*sorted({kernel.metadata.name for kernel in compiled}))
"""


def test_every_kernel_compiles_for_a_gpu_and_fits_its_shared_memory(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = [
        "_add_rms_norm",
        "_attend",
        "_expand",
        "_join",
        "_norm_and_rotate",
        "_shrink",
        "_silu_and_multiply",
        "_store",
    ]
    assert done.stdout.split() == names

"""A base in fewer bits: how far its weights are from what they were, what its products are, and what it takes."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from loraserve.base import quantize
from loraserve.base.attention import PackedAttention
from loraserve.base.linear import Linear
from loraserve.base.load import Base, load_base
from loraserve.base.mapped import page_out
from loraserve.errors import CheckpointError, InvalidRequest
from loraserve.train.memory import weight_bytes
from tests.train.conftest import write_base

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HOWS = pytest.mark.parametrize("how", quantize.QUANTIZATIONS)


def quantised(folder: Path, how: str | None, dtype: str = "float32") -> Base:
    base = load_base(str(folder), device="cpu", dtype=dtype, weights=False)
    base.load_weights(how)
    return base


def weight(rows: int = 700, inputs: int = 48) -> torch.Tensor:
    """Of rows as different as those of real layers, one of them zero; more than are rounded at a time."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-3, 0, rows).unsqueeze(1)
    scale[5] = 0
    return torch.randn(rows, inputs, generator=generator) * scale


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_int8_is_off_by_half_a_step_of_its_row_at_most(dtype: torch.dtype) -> None:
    W = weight()
    found = quantize.quantized(W, "int8", dtype).dequantized()
    assert found.dtype == dtype and found.shape == W.shape
    step = W.abs().amax(dim=1, keepdim=True) / 127
    off = (found.float() - W).abs() / step.clamp_min(1e-9)
    assert 0.3 < off.max() <= 0.5 + (0.01 if dtype == torch.float32 else 0.5)  # and the rounding to the dtype itself
    assert found[5].abs().max() == 0


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("inputs", [48, 64, 96])
def test_nf4_gives_each_weight_the_nearest_of_sixteen_times_its_blocks_largest(dtype: torch.dtype, inputs: int) -> None:
    """Catches blocks that are read across the ends of rows, and slabs in another order."""
    W = weight(inputs=inputs)[:696] if inputs == 48 else weight(inputs=inputs)
    found = quantize.quantized(W, "nf4", dtype).dequantized()
    codes = quantize.bitsandbytes().quantize_4bit(torch.eye(8), quant_type="nf4")[1].code
    blocks = W.reshape(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    nearest = codes[((blocks / scale.clamp_min(1e-30)).unsqueeze(-1) - codes).abs().argmin(dim=-1)] * scale
    assert (nearest - blocks).abs().max() > 0.05
    torch.testing.assert_close(found, nearest.view(W.shape).to(dtype), rtol=1e-2, atol=1e-9)


@HOWS
def test_products_and_gradients_are_those_of_the_dequantised_weight(how: str) -> None:
    layer = Linear("model.layers.0.mlp.up_proj", 48, 64)
    layer.quantize(weight(64), how, torch.float32)
    assert layer.weight.is_meta
    x = torch.randn(5, 48, requires_grad=True)
    y = layer(x, None)
    y.backward(torch.ones_like(y))
    W = layer.weight_used()
    assert (W - weight(64)).abs().max() > 1e-5
    assert y.equal(F.linear(x, W)) and x.grad is not None and x.grad.equal(torch.ones_like(y) @ W)
    assert layer.backward_product(y.detach()).equal(y.detach() @ W)


@HOWS
@pytest.mark.parametrize("num_experts", [0, 4], ids=["dense", "experts"])
def test_a_quantised_base_computes_with_its_dequantised_weights_and_keeps_no_others(
    how: str, num_experts: int, tmp_path: Path
) -> None:
    """Catches a layer left out or rounded that should not be, a copy kept, and weights of another layer."""
    folder = write_base(tmp_path / "tiny", num_experts=num_experts)
    base, plain = quantised(folder, how), load_base(str(folder), device="cpu", dtype="float32")
    assert base.model.quantized == how and plain.model.quantized is None
    rounded = quantize.quantized_shapes(base.config)
    assert len(rounded) == 3 * (4 + 3 * max(num_experts, 1))
    for target, shape in base.shapes.items():
        layer = base.model.get_submodule(target)
        assert isinstance(layer, Linear) and layer.weight.is_meta == (target in rounded)
        weight, original = base.weight_of(target), plain.weight_of(target)
        assert weight.shape == shape and weight.equal(original) == (target not in rounded)
        assert F.cosine_similarity(weight.flatten(), original.flatten(), dim=0) > 0.99
    ids, attention = torch.arange(3, 43) % 300, PackedAttention([25, 15])
    with torch.no_grad():
        logits = base.model(ids, attention.positions, attention)
        for target in rounded:
            plain.model.get_submodule(target).weight.copy_(base.weight_of(target))
        assert logits.equal(plain.model(ids, attention.positions, attention))


@HOWS
def test_a_quantised_layer_takes_what_is_said(how: str) -> None:
    kept = quantize.quantized(weight(640, 256), how, torch.bfloat16)
    assert kept.num_bytes == quantize.num_bytes((640, 256), how, torch.bfloat16)
    assert kept.num_bytes < 640 * 256 * (1.01 if how == "int8" else 0.57)


def test_weights_come_when_they_are_asked_for(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "tiny")
    base, plain = quantised(folder, None), load_base(str(folder), device="cpu", dtype="float32")
    waiting = load_base(str(folder), device="cpu", dtype="float32", weights=False)
    assert not waiting.has_weights and plain.has_weights and base.has_weights
    assert waiting.fingerprint == plain.fingerprint == quantised(folder, "int8").fingerprint
    state, other = base.model.state_dict(), plain.model.state_dict()
    assert state.keys() == other.keys() and all(state[name].equal(other[name]) for name in state)
    assert base.model.lm_head.weight is base.model.model.embed_tokens.weight
    assert not any(p.requires_grad for p in base.model.parameters()) and not base.model.training
    plain.load_weights()
    with pytest.raises(InvalidRequest, match=r"quantize is int8, but the base is in memory with quantize None"):
        plain.load_weights("int8")


def test_files_that_change_before_the_weights_are_read_are_refused(tmp_path: Path) -> None:
    """Catches an adapter whose fingerprint is that of a base on which it was not trained."""
    for name, text in (("weights", ""), ("config.json", '"rope_theta": 10000.0')):
        folder = write_base(tmp_path / name)
        waiting = load_base(str(folder), device="cpu", dtype="float32", weights=False)
        if text:
            config = folder / name
            assert text in config.read_text()
            config.write_text(config.read_text().replace(text, '"rope_theta": 20000.0'))
        else:
            tensors = load_file(folder / "model.safetensors")
            save_file({key: 2 * tensor for key, tensor in tensors.items()}, folder / "model.safetensors")
        with pytest.raises(
            CheckpointError, match=f"{name} was changed after it was opened.*run the same command again"
        ):
            waiting.load_weights("int8")
        assert not waiting.has_weights


def test_a_base_with_a_layer_that_cannot_be_kept_so_stays_whole(tmp_path: Path) -> None:
    """Catches layers that are rounded before the one that cannot be."""
    folder = write_base(tmp_path / "odd", width=49)
    base, plain = (load_base(str(folder), device="cpu", dtype="float32", weights=full) for full in (False, True))
    assert quantize.fits("int8", base.config) and not quantize.fits("nf4", base.config)
    with pytest.raises(InvalidRequest, match=r"64·n weights, and model.layers.0.mlp.\w+ has the shape .*int8"):
        base.load_weights("nf4")
    assert not base.has_weights
    base.load_weights()
    for target in base.shapes:
        assert base.weight_of(target).equal(plain.weight_of(target))


READING = """
import sys, psutil
from pathlib import Path
from loraserve.base.load import load_base
from loraserve.train.allocator import give_back_large_tensors
give_back_large_tensors()
base = load_base(sys.argv[1], device="cpu", dtype="float32", weights=False)
before = psutil.Process().memory_info().rss
Path("/proc/self/clear_refs").write_text("5")
base.load_weights("int8")
peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
print(int(peak) * 1024 - before)
"""


def pages_go(file: Path) -> bool:
    """Whether memory under a mapped file can be let go; on a tmpfs it cannot."""
    bytes_of = torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8)
    before = psutil.Process().memory_info().rss
    bytes_of.sum()
    page_out(bytes_of)
    return psutil.Process().memory_info().rss - before < len(bytes_of) / 2


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process its peak")
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "base.pth"])
def test_reading_a_base_in_fewer_bits_takes_no_more_than_they_do(name: str, tmp_path: Path) -> None:
    """Catches a file of 151 MB in memory as a whole, beside the 38 MB that are kept of it."""
    folder = write_base(tmp_path / "large", hidden=512, width=8192)
    if name != "model.safetensors":
        torch.save(load_file(folder / "model.safetensors"), folder / name)
        (folder / "model.safetensors").unlink()
    os.sync()  # pages that are still to be written stay in memory
    if not pages_go(folder / name):
        pytest.skip("on this file system pages of files stay in memory")
    path = folder / name if name.endswith(".pth") else folder
    base = load_base(str(path), device="cpu", dtype="float32", weights=False)  # remembers the fingerprint
    kept = weight_bytes(base.config, base.dtype, "int8")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", READING, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert 0.8 * kept < int(done.stdout) < kept + (80 << 20), (kept, done.stdout)


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="quantize is one of int8, nf4, not 'int3'"):
        quantize.check_quantization("int3")
    quantize.check_quantization("nf4")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidRequest, match=r"pip install 'loraserve\[bitsandbytes\]'"):
        quantize.check_quantization("nf4")
    quantize.check_quantization("int8")


def test_the_library_is_loaded_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    level = logging.getLogger("bitsandbytes").level
    assert hasattr(quantize.bitsandbytes(), "quantize_4bit") and not caplog.records
    assert logging.getLogger("bitsandbytes").level == level

"""What is dropped and computed again, or in chunks, changes neither losses nor gradients."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from loraserve.base import recompute
from loraserve.base.load import load_base
from loraserve.lora.stack import AdapterStack
from loraserve.train import loss as loss_module
from loraserve.train.batch import pack, summed_loss
from tests.train.test_step import gradients, logits_of, random_samples, trainable


def adapter(base, head):
    return {target: w for target, w in trainable(base).items() if head or target != "lm_head"}


def plainly(base, batch, weights, monkeypatch):
    """Loss and gradient with every logit and every intermediate result kept."""
    with monkeypatch.context() as patch:
        for module in ("model", "attention"):
            patch.setattr(f"loraserve.base.{module}.recompute", lambda step, *inputs: step(*inputs))
        loss = F.cross_entropy(logits_of(base.model, batch, AdapterStack([weights])), batch.targets, reduction="sum")
        loss.backward()
    return loss.detach(), gradients(weights)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("head", [False, True], ids=["frozen-head", "head-with-adapter"])
@pytest.mark.parametrize("which", ["base", "moe_base"])
def test_chunks_and_recomputation_change_neither_loss_nor_gradient(which, head, checkpointing, request, monkeypatch):
    """Catches a chunk left out, rows of another chunk's adapter, gradients that stop at a recomputed step."""
    base = request.getfixturevalue(which)
    batch = pack(random_samples(5))
    wanted, gradient = plainly(base, batch, adapter(base, head), monkeypatch)
    monkeypatch.setattr(loss_module, "CHUNK_ROWS", 7)
    assert batch.num_supervised > 21 and batch.num_supervised % 7 and gradient.abs().max() > 0.1
    weights = adapter(base, head)
    loss = summed_loss(base.model, batch, AdapterStack([weights]), checkpointing=checkpointing)
    loss.backward()
    torch.testing.assert_close(loss.detach(), wanted, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradients(weights), gradient, rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(summed_loss(base.model, batch, AdapterStack([weights])), wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_fewer_bits_too(dtype, base_dir, monkeypatch):
    base = load_base(str(base_dir), device="cpu", dtype=dtype)
    batch = pack(random_samples(5))
    wanted, gradient = plainly(base, batch, adapter(base, head=False), monkeypatch)
    weights = adapter(base, head=False)
    loss = summed_loss(base.model, batch, AdapterStack([weights]), checkpointing=True)
    (loss / batch.num_supervised).backward()
    torch.testing.assert_close(loss.detach(), wanted, rtol=1e-3, atol=0.1)
    found = gradients(weights) * batch.num_supervised
    assert F.cosine_similarity(found, gradient, dim=0) > 0.999
    assert found.norm().item() == pytest.approx(gradient.norm().item(), rel=0.02)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
@pytest.mark.parametrize("head", [False, True], ids=["frozen-head", "head-with-adapter"])
def test_products_by_the_kernels_give_the_same_loss_and_gradient(head, base_dir, monkeypatch):
    """Both ways: x Wᵀ and, for the gradient, g W."""
    monkeypatch.setattr("loraserve.kernels.gemm.fast", lambda: True)
    base = load_base(str(base_dir), device="cpu", dtype="bfloat16")
    batch = pack(random_samples(5))
    wanted, gradient = plainly(base, batch, adapter(base, head), monkeypatch)
    base.model.pack_for_training()
    both = base.model.model.layers[0].mlp.down_proj._both_ways
    rows, ways = [], (both.forward, both.backward)
    monkeypatch.setattr(both, "forward", lambda x: rows.append(len(x)) or ways[0](x))
    monkeypatch.setattr(both, "backward", lambda x: rows.append(len(x)) or ways[1](x))
    weights = adapter(base, head)
    loss = summed_loss(base.model, batch, AdapterStack([weights]), checkpointing=False)
    (loss / batch.num_supervised).backward()
    assert rows == [batch.num_rows] * 2
    torch.testing.assert_close(loss.detach(), wanted, rtol=1e-3, atol=0.1)
    found = gradients(weights) * batch.num_supervised
    assert F.cosine_similarity(found, gradient, dim=0) > 0.999
    assert found.norm().item() == pytest.approx(gradient.norm().item(), rel=0.02)


def test_a_recomputed_step_keeps_its_inputs_alone():
    x = torch.randn(5, 8, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = recompute.recompute(lambda x: x.exp().sin().exp(), x)
    y.sum().backward()
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]
    wanted = torch.autograd.grad(x.exp().sin().exp().sum(), x)[0]
    torch.testing.assert_close(x.grad, wanted)

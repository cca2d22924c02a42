"""An adapter in one buffer is the same adapter, wherever the buffer is."""

import torch

from loraserve.lora.adapter import Adapter, LoraWeight
from loraserve.lora.packed import LINE, Packed

SHAPES = {"model.layers.0.self_attn.q_proj": (7, 5), "model.layers.1.mlp.up_proj": (11, 5), "lm_head": (13, 3)}


def adapter(seed: int = 0, scaling: float = 2.0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    weights = {
        target: LoraWeight(
            torch.randn(r, width, generator=generator), torch.randn(out, r, generator=generator), scaling
        )
        for r, (target, (out, width)) in enumerate(SHAPES.items(), 1)
    }
    return Adapter(weights, "some")


def test_a_packed_adapter_has_the_same_numbers_laid_out_for_a_delta_and_no_padded_rank() -> None:
    stored = adapter()
    for dtype in (torch.float32, torch.bfloat16):
        packed = Packed.of(stored, dtype)
        assert packed.adapter.name == "some" and packed.adapter.weights.keys() == stored.weights.keys()
        end = packed.buffer.data_ptr() + packed.buffer.nbytes
        for target, weight in packed.adapter.weights.items():
            was = stored.weights[target]
            assert torch.equal(weight.A, was.A.to(dtype)) and torch.equal(weight.B, was.B.to(dtype))
            assert weight.A.is_contiguous() and weight.B.T.is_contiguous() and weight.scaling == was.scaling
            for tensor in (weight.A, weight.B):
                assert packed.buffer.data_ptr() <= tensor.data_ptr() < end
                assert (tensor.data_ptr() - packed.buffer.data_ptr()) % LINE == 0
        assert packed.adapter.num_bytes == sum(
            (w.A.numel() + w.B.numel()) * dtype.itemsize for w in stored.weights.values()
        )


def test_a_copy_of_the_buffer_is_the_same_adapter_with_the_same_digest() -> None:
    packed = Packed.of(adapter(), torch.float32)
    copy = packed.over(packed.buffer.clone())
    packed.buffer.zero_()
    for target, weight in copy.adapter.weights.items():
        assert torch.equal(weight.B, adapter().weights[target].B)
    assert copy.adapter.digest == packed.adapter.digest


def test_the_digest_tells_contents_apart() -> None:
    digests = [
        Packed.of(adapter(seed, scaling), dtype).adapter.digest
        for seed in (0, 1)
        for scaling in (1.0, 2.0)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert len(set(digests)) == 8
    assert Packed.of(adapter(), torch.float32).adapter.digest == digests[2], "and nothing else"


def test_the_bytes_of_an_adapter_are_counted_once() -> None:
    looks = []

    class Watched(dict[str, LoraWeight]):
        def values(self):
            looks.append(1)
            return super().values()

    stored = adapter()
    watched = Adapter(Watched(stored.weights))
    assert [watched.num_bytes for _ in range(3)] == [stored.num_bytes] * 3 and stored.num_bytes > 0
    assert len(looks) == 1

"""Storing keys and values, and attention of rows of one token each over what their slots hold.

    out = softmax(q Kᵀ / √D) V      K, V: positions 0 to the row's own of its slot

A context is split at fixed positions that follow from the cache's length alone, one program per (row, key head, split);
a second kernel joins a head's splits. So a row's sums have the same order whoever else is in the batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_SPLITS = 16
SPLIT = 256
"""Positions of one split, more in caches whose slots are longer than MAX_SPLITS of them."""
MAX_BLOCK_T, MAX_BLOCK_BYTES = 64, 16 << 10
"""Positions, and bytes of keys, that a program reads at a time: two stages of keys and values fit any GPU's memory."""


def store_and_attend(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, decoding: int,
    longest: int, out: Tensor,
) -> None:  # fmt: skip
    """Store k and v in a layer's cache (slots, KV, max_len, D); attend for the first `decoding` rows.

    As `cpu.store_and_attend`; beyond that, a row whose slot is negative stores nothing and gets zeros.
    """
    n, h, d = q.shape
    kv, max_len = keys.shape[1], keys.shape[2]
    assert q.dtype == k.dtype == v.dtype == keys.dtype == values.dtype == out.dtype
    assert q.stride()[1:] == k.stride()[1:] == v.stride()[1:] == (d, 1)
    assert keys.is_contiguous() and values.is_contiguous() and out.is_contiguous()
    block_d = max(triton.next_power_of_2(d), 16)
    with torch.cuda.device_of(q):
        if n:
            _store[(n, kv)](k, v, k.stride(0), v.stride(0), keys, values, slots, positions, kv, max_len, D=d,
                            BLOCK_D=block_d, num_warps=1)  # fmt: skip
        if not decoding:
            return
        split = max(SPLIT, triton.cdiv(triton.cdiv(max_len, MAX_SPLITS), MAX_BLOCK_T) * MAX_BLOCK_T)
        splits = triton.cdiv(longest, split)
        block_t = min(MAX_BLOCK_T, MAX_BLOCK_BYTES // (block_d * q.element_size()))
        group = h // kv
        parts = torch.empty(decoding, h, splits, d, device=q.device)  # each split's sum of p · v
        sums = torch.empty(decoding, h, splits, 2, device=q.device)  # each split's highest score, and sum of p
        _attend[(decoding, kv, splits)](
            q, q.stride(0), keys, values, slots, positions, parts, sums, kv, group, max_len, splits, d**-0.5, split,
            D=d, UPCAST=not isinstance(_attend, triton.JITFunction), BLOCK_G=max(triton.next_power_of_2(group), 16),
            BLOCK_T=block_t, BLOCK_D=block_d, num_stages=2,
        )  # fmt: skip
        _join[(decoding, h)](parts, sums, slots, positions, out, h, splits, split, D=d, BLOCK_S=MAX_SPLITS,
                             BLOCK_D=block_d)  # fmt: skip


@triton.jit
def _store(
    k, v, k_stride, v_stride, keys, values, slots, positions, kv, max_len, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row)
    if slot >= 0:
        cols = tl.arange(0, BLOCK_D)
        mask = cols < D
        at = ((slot * kv + head) * max_len + tl.load(positions + row)) * D + cols
        tl.store(keys + at, tl.load(k + row.to(tl.int64) * k_stride + head * D + cols, mask=mask), mask=mask)
        tl.store(values + at, tl.load(v + row.to(tl.int64) * v_stride + head * D + cols, mask=mask), mask=mask)


@triton.jit
def _attend(
    q, q_stride, keys, values, slots, positions, parts, sums, kv, group, max_len, splits, scale, split_length,
    D: tl.constexpr, UPCAST: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots + row)
    begin = split * split_length
    end = tl.minimum(begin + split_length, tl.load(positions + row).to(tl.int32) + 1)
    if (slot >= 0) & (begin < end):
        g, d, t = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_T)
        ours = (g < group)[:, None] & (d < D)[None, :]
        heads = head * group + g  # the queries that share the key head
        query = tl.load(q + row.to(tl.int64) * q_stride + heads[:, None] * D + d[None, :], mask=ours, other=0.0)
        if UPCAST:  # Triton's interpreter has no products of bfloat16
            query = query.to(tl.float32)
        past = (slot * kv + head) * max_len * D
        top = tl.full((BLOCK_G,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_G,), tl.float32)
        acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
        for start in range(begin, end, BLOCK_T):
            seen = start + t < end
            at = past + (start + t).to(tl.int64)[:, None] * D + d[None, :]
            mask = seen[:, None] & (d < D)[None, :]
            key = tl.load(keys + at, mask=mask, other=0.0).to(query.dtype)  # (T, D)
            scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
            scores = tl.where(seen[None, :], scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, axis=1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp(scores - base[:, None])
            fade = tl.exp(top - base)
            value = tl.load(values + at, mask=mask, other=0.0).to(query.dtype)
            total = total * fade + tl.sum(p, axis=1)
            acc = acc * fade[:, None] + tl.dot(p.to(value.dtype), value, input_precision="ieee")
            top = higher
        here = (row.to(tl.int64) * kv * group + heads) * splits + split
        tl.store(parts + here[:, None] * D + d[None, :], acc, mask=ours)
        tl.store(sums + here * 2, top, mask=g < group)
        tl.store(sums + here * 2 + 1, total, mask=g < group)


@triton.jit
def _join(
    parts, sums, slots, positions, out, h, splits, split_length,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    at = row.to(tl.int64) * h + head
    s, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    idle = tl.load(slots + row) < 0
    # The same tree of additions for any number of splits, so that others' contexts do not change a row's bits.
    length = tl.where(idle, 0, tl.load(positions + row) + 1)
    used = (s * split_length < length) & (s < splits)
    top = tl.load(sums + (at * splits + s) * 2, mask=used, other=float("-inf"))
    total = tl.load(sums + (at * splits + s) * 2 + 1, mask=used, other=0.0)
    highest = tl.max(top, axis=0)
    weight = tl.where(used, tl.exp(top - tl.where(highest == float("-inf"), 0.0, highest)), 0.0)
    part = tl.load(
        parts + (at * splits + s)[:, None] * D + d[None, :], mask=used[:, None] & (d < D)[None, :], other=0.0
    )
    attended = tl.sum(part * weight[:, None], axis=0) / tl.where(idle, 1.0, tl.sum(total * weight, axis=0))
    tl.store(out + at * D + d, attended.to(out.dtype.element_ty), mask=d < D)

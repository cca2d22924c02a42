"""Attention without a cache: whole sequences laid end to end, each seeing only itself. Training and scoring use it.

The rows stay flat for every linear layer. On a CPU sequences are attended to one by one, unless they are of one length.
A GPU wants them together: there they are set into a (B, T) grid, padded at the end, where the causal mask hides the
padding from every real row.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from loraserve.base.recompute import recompute

LONG = 192
"""Rows of a sequence whose gradients processors with tiles compute faster in bfloat16 than in float32."""


class PackedAttention:
    """Causal attention within each of several sequences laid end to end.

    Args:
        lengths: the sequences' numbers of rows; their sum is N.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.max_position = longest = max(lengths)
        self.cached = None
        self.grid = (len(lengths), longest)
        sizes = torch.tensor(lengths)
        self.positions = torch.cat([torch.arange(n) for n in lengths]).to(device)  # (N,)
        self._lengths = list(lengths)
        self._dense = all(n == longest for n in lengths)
        starts = torch.arange(len(lengths)) * longest
        self._cells = (starts.repeat_interleave(sizes) + self.positions.cpu()).to(device)  # (N,) row -> grid cell

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._dense and not self._in_float32(q):
            return self._attend(q, k, v)
        return recompute(self._attend, q, k, v)  # keeps no padded or float32 copies

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dtype = q.dtype
        if self._in_float32(q):
            q, k, v = q.float(), k.float(), v.float()
        if self._dense or q.device.type != "cpu":
            out = _attend(*(self._spread(x) for x in (q, k, v))).transpose(1, 2).flatten(0, 1)  # (B*T, H, D)
            return (out if self._dense else out[self._cells]).to(dtype)
        alone = zip(*(x.transpose(0, 1).split(self._lengths, dim=1) for x in (q, k, v)), strict=True)  # (H, T, D) each
        parts = [_attend(*(x.unsqueeze(0) for x in each))[0] for each in alone]
        return torch.cat(parts, dim=1).transpose(0, 1).to(dtype)

    def _in_float32(self, x: Tensor) -> bool:
        return attends_in_float32(x, long=self.max_position >= LONG)

    def _spread(self, x: Tensor) -> Tensor:
        """(N, H, D) -> (B, H, T, D)."""
        b, t = self.grid
        if not self._dense:
            x = x.new_zeros(b * t, *x.shape[1:]).index_copy(0, self._cells, x)
        return x.view(b, t, *x.shape[1:]).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q (B, H, T, D) over k and v (B, KV, T, D), (B, H, T, D)."""
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def attends_in_float32(x: Tensor, long: bool = True) -> bool:
    """Whether x, of any dtype, is attended to faster in float32, as measured: on a CPU without tiles (AMX), and with
    them where there are gradients of sequences that are not long."""
    if x.device.type != "cpu" or x.dtype == torch.float32:
        return False
    return not (long and x.dtype == torch.bfloat16 and torch.cpu.get_capabilities().get("amx_bf16"))

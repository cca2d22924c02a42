"""The C kernels, called with tensors. Shapes and equations stand in cpu.c and lora.c; all tensors are on the CPU.

Activations are float32 or bfloat16; whatever is said to be float32 is. Callers see to contiguity.
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from loraserve.kernels.build import library

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
QUICK_ROWS = 32
"""What a call does for so many rows takes microseconds; a matrix product always takes longer."""
FEW_ROWS = sys.maxsize
"""Of a slot, for which adding the deltas by the kernel is fastest: any number."""
LANES, MAX_HEAD_DIM = 16, 256
"""Heads are read in vectors of so many numbers."""


def available(dtype: torch.dtype, head_dim: int = LANES) -> bool:
    """Whether the kernels run here for activations of `dtype` and heads of `head_dim`."""
    fits = head_dim % LANES == 0 and head_dim <= MAX_HEAD_DIM
    return fits and dtype in DTYPES and library() is not None


def add_rms_norm(
    x: Tensor, y: Tensor | None, weight: Tensor, eps: float, cast_first: bool, dtype: torch.dtype
) -> Tensor:
    """Add y (N, D) to x (N, D) float32 in place and return the normed sum, times weight (D,) float32, in `dtype`."""
    out = torch.empty(x.shape, dtype=dtype)
    n, d = x.shape
    call("add_rms_norm", dtype, x, y, weight, out, n, d, eps, int(cast_first), quick=n <= QUICK_ROWS)
    return out


def norm_and_rotate(
    qkv: Tensor,
    heads: tuple[int, int, int],
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    cast_first: bool,
    table: Tensor,
    positions: Tensor,
) -> None:
    """Norm and rotate queries and keys in qkv (N, (H + 2 KV) D) in place.

    Args:
        heads: H, KV and D.
        norms: the weights (D,) float32 of the norms of queries and keys, or None for no norms.
        table: (positions, 2, D) float32, cos and sin.
        positions: (N,) int64.
    """
    q_norm, k_norm = norms or (None, None)
    call("norm_and_rotate", qkv.dtype, qkv, *qkv.shape, *heads, q_norm, k_norm, eps, int(cast_first),
          table, positions, quick=qkv.shape[0] <= QUICK_ROWS)  # fmt: skip


def store_and_attend(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, decoding: int,
    longest: int, out: Tensor,
) -> None:  # fmt: skip
    """Store k and v (N, KV, D) in a layer's cache (slots, KV, max_len, D); attend for the first `decoding` rows.

    q, k and v may be views of wider rows. `out` (N, H, D) gets those rows. `longest`, which all positions are below, is
    for kernels that need to know.
    """
    n, h, d = q.shape
    assert q.dtype == k.dtype == v.dtype == keys.dtype == values.dtype == out.dtype
    assert q.stride()[1:] == k.stride()[1:] == v.stride()[1:] == (d, 1) and keys.is_contiguous()
    call("store_and_attend", q.dtype, q, k, v, q.stride(0), k.stride(0), v.stride(0), keys, values, keys.shape[2],
          slots, positions, n, decoding, h, k.shape[1], d, d**-0.5, out,
         quick=n <= QUICK_ROWS)  # fmt: skip


def silu_and_multiply(gate_up: Tensor) -> Tensor:
    """silu(gate) · up, (N, D), of gate and up side by side in (N, 2 D)."""
    n, d = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(n, d, dtype=gate_up.dtype)
    call("silu_and_multiply", gate_up.dtype, gate_up, out, n, d, quick=n <= QUICK_ROWS)
    return out


Entries = tuple[Tensor, Tensor, Tensor]
"""Rows, slots and weights of entries, sorted by slot."""


def entries(row_weights: Tensor, device: torch.device | str = "cpu") -> Entries:
    """Return the nonzero entries of W (N, S) float32."""
    slots, rows = row_weights.T.nonzero(as_tuple=True)
    return rows.contiguous(), slots.contiguous(), row_weights[rows, slots]


def deltas(
    weights: Sequence[Sequence[tuple[Tensor, Tensor, float] | None]], widths: Sequence[int], dtype: torch.dtype
) -> "Deltas":
    """Return what adapters do to layers of one input."""
    return Deltas(weights, widths, dtype)


class Deltas:
    """What adapters do to layers of one input, as the kernel wants it: pointers to A (r, in) and Bᵀ (r, out).

    Args:
        weights: per adapter and target A (r, in), B (out, r) and scaling, or None. Contiguous A and Bᵀ are not copied.
        widths: out_features of each target.
        dtype: of A, B and the activations.
    """

    def __init__(
        self,
        weights: Sequence[Sequence[tuple[Tensor, Tensor, float] | None]],
        widths: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        cells = [cell for row in weights for cell in row]
        self._dtype = dtype
        self._kept = [(_by_rows(c[0], dtype), _by_columns(c[1], dtype)) if c else None for c in cells]
        self._A = torch.tensor([k[0].data_ptr() if k else 0 for k in self._kept])
        self._B = torch.tensor([k[1].data_ptr() if k else 0 for k in self._kept])
        ranks = [k[0].shape[0] if k else 0 for k in self._kept]
        self._ranks = torch.tensor(ranks)
        self._scaling = torch.tensor([c[2] if c else 0.0 for c in cells])
        self._widths = torch.tensor(list(widths))
        self._most = max(ranks)
        tables = (self._widths, self._A, self._B, self._ranks, self._scaling)
        self.fields = [len(widths), *(table.data_ptr() for table in tables), self._most]
        """As decoder.c reads them."""

    def scratch(self, entries: int) -> int:
        """Floats that the kernel needs for so many entries."""
        floats = entries * len(self._widths) * self._most
        return floats + floats % 2 + 2 * (entries + 1)

    def add(self, x: Tensor, y: Tensor, entries: Entries) -> None:
        """Add to y (N, Σout) in place what the entries ask for; x (N, in)."""
        rows, slots, weights = entries
        assert x.dtype == y.dtype == self._dtype and x.is_contiguous() and y.is_contiguous()
        scratch = torch.empty(self.scratch(len(rows)))
        call("add_deltas", self._dtype, x, x.shape[1], y, y.shape[1], len(rows), rows, slots, weights,
              len(self._widths), self._widths, self._A, self._B, self._ranks, self._scaling, self._most,
              scratch, quick=len(rows) <= QUICK_ROWS)  # fmt: skip


def _by_rows(A: Tensor, dtype: torch.dtype) -> Tensor:
    return A if A.dtype == dtype and A.is_contiguous() else A.to(dtype).contiguous()


def _by_columns(B: Tensor, dtype: torch.dtype) -> Tensor:
    """B with Bᵀ contiguous. Each change of the active set asks for hundreds, so no call too many where it is that."""
    return B if B.dtype == dtype and B.stride() == (1, B.shape[0]) else B.to(dtype).T.contiguous().T


def call(name: str, dtype: torch.dtype, *args: Tensor | float | None, quick: bool = False) -> None:
    """Call a kernel. While it runs other threads run too, unless it is `quick`, see `Library`.

    Pointers and int64 pass as they are, for all arguments are declared so but the floats.
    """
    found = library()
    assert found is not None
    function = getattr(found.quick if quick else found.long, f"{name}_{DTYPES[dtype]}")
    function(*[a.data_ptr() if isinstance(a, Tensor) else a for a in args])

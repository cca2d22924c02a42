"""The frozen layers' matrix products on a CPU: weights laid out once for the kernels of gemm.c.

    y = x Wᵀ

in float32, bfloat16, or with int8 weights. With int8, each output's weights and each row of activations are rounded to
8 bits with a scale of their own, so a row never depends on its neighbours:

    y[n, o] ≈ x_scale[n] · w_scale[o] · Σ_k q_x[n, k] · q_w[o, k],    scale = max|·| / 127

`multiply_rounded` is that in plain torch, the tests' oracle.
"""

import torch
from torch import Tensor

from loraserve.kernels import cpu
from loraserve.kernels.build import library

INPUTS = 16
"""in_features must be a multiple of it."""
STEPS = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}


def available(dtype: torch.dtype, in_features: int) -> bool:
    """Whether the kernels run here for activations of `dtype`."""
    return dtype in cpu.DTYPES and in_features % INPUTS == 0 and library() is not None


def fast() -> bool:
    """Whether the kernels are the fastest there is, as measured: with AVX2, with AVX-512 and with tiles (AMX)."""
    return bool(torch.cpu.get_capabilities().get("avx2"))


class PackedWeight:
    """A weight (out, in), laid out for the kernels. A copy: the weight itself is not needed any more.

    Args:
        weight: float32 or bfloat16.
        int8: round it to 8 bits.
    """

    def __init__(self, weight: Tensor, int8: bool = False) -> None:
        self._dtype = weight.dtype
        self.out_features, self.in_features = weight.shape
        self._scale, self._sum = None, None
        if int8:
            weight, scale = rounded(weight)
            self._scale, self._sum = _filled(scale), _filled(weight.sum(dim=1, dtype=torch.int32))
        step = STEPS[weight.dtype]
        blocks = _filled(weight).view(-1, _vector_width(), self.in_features // step, step)
        self.weight = blocks.transpose(1, 2).contiguous()  # (out / width, in / step, width, step)

    @property
    def pointers(self) -> list[int]:
        """Of the weight, its scales and its sums, as decoder.c reads them; 0 for what there is not."""
        return [0 if t is None else t.data_ptr() for t in (self.weight, self._scale, self._sum)]

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for t in (self.weight, self._scale, self._sum) if t is not None)

    def multiply(self, x: Tensor) -> Tensor:
        """Return x Wᵀ, (N, out) in x's dtype, for x (N, in) of the weight's original dtype."""
        x = x.contiguous()
        (m, k), n = x.shape, self.out_features
        assert x.dtype == self._dtype and k == self.in_features
        y = torch.empty(m, n, dtype=x.dtype)
        scratch = torch.empty(m + m * k + m * k // 4)
        if self._scale is None:
            cpu.call("multiply", x.dtype, x, self.weight, y, m, k, n, scratch)
        else:
            cpu.call("multiply_int8", x.dtype, x, self.weight, self._scale, self._sum, y, m, k, n, scratch)
        return y


class BothWays:
    """A frozen weight W (out, in) in training: x Wᵀ forward, and for the gradient g of the result g W backward.

    Two copies of the weight, laid out for the one and for the other.
    """

    def __init__(self, weight: Tensor) -> None:
        self.forward = PackedWeight(weight).multiply
        self.backward = PackedWeight(weight.T.contiguous()).multiply


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of x (N, K) to 8 bits; return int8 (N, K) and the rows' scales (N,) float32."""
    x = x.float()
    most = x.abs().amax(dim=1)
    inverse = torch.where(most > 0, 127.0 / most, 0.0)
    return (x * inverse.unsqueeze(1)).round().to(torch.int8), most / 127.0


def multiply_rounded(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ (N, out) float32 as int8 computes it, in plain torch."""
    (q_x, x_scale), (q_w, w_scale) = rounded(x), rounded(weight)
    return (q_x.double() @ q_w.double().T).float() * (w_scale * x_scale.unsqueeze(1))


def _filled(x: Tensor) -> Tensor:
    """x (out, …) with zeros up to a whole number of vectors."""
    missing = -x.shape[0] % _vector_width()
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


def _vector_width() -> int:
    """Outputs stand in vectors of so many."""
    found = library()
    assert found is not None
    return int(found.quick.vector_width())

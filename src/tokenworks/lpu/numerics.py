"""The numerics table: what one right answer is. The machine and the oracle both follow it.

| what | how |
|---|---|
| weights | int8, one scale per output channel: the largest magnitude / 127, ties to even |
| activations into a matrix | 15 bits: whole numbers up to 16,256, one scale per vector (largest \
magnitude / 16,256), sent as two int8 rows, q = 128 * high + low, high = round(q / 128) |
| products | int8 * int8, summed in int32 exactly; fp32(high) * 128 + fp32(low), one rounding each |
| keys and values | int8, one scale for each token and layer (all heads together), fp32 scales |
| queries | 15 bits, one scale for all heads of the token |
| softmax | e^(score - the head's largest); 15 bits, 1 is 16,256, for the sum, which is exact; \
times the values' scales, 15 bits with one scale for all heads, for the weighted sum |
| rotary, SiLU, residual | fp32, every operation rounded once |
| norms | 15 bits of x * weight; 1 / sqrt(mean of x² + eps), fp32, goes into their scale |
| a layer shared by chips | chip c of n has the c-th share of the heads, with their key heads, of \
the inner numbers and of the words; queries, keys, values, heads' outputs and inner numbers have a \
scale for each chip's share |
| sum over chips | each chip's product with its columns of the matrix in fp32, ((0 + 1) + 2) + …; \
then the residual is added |
| sum over lanes | vectors first, in order; then the 16 lanes of a tile in order; then tiles t and \
t + 10; then these ten in order |
| 1 / a | RSQRT(a) squared |
| EXP | below -87: 0; above 88: as 88. k = round(a * LOG2E), r = (a - k * LN2_HIGH) - k * LN2_LOW, \
Horner over EXP_COEFFICIENTS, times 2^k |
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.int8]

WEIGHT_MOST: Final = 127
HIGH: Final = 128  # what a step of the high row is worth
MOST: Final = WEIGHT_MOST * HIGH  # 16,256
LEAST_PEAK: Final = np.float32(1e-30)  # stands in for the peak of a vector of zeros
MASKED: Final = np.float32(-1e30)

LOG2E: Final = np.float32(1.44269504)
LN2_HIGH: Final = np.float32(0.693359375)
LN2_LOW: Final = np.float32(-2.12194440e-4)
EXP_LEAST: Final = np.float32(-87.0)
EXP_MOST: Final = np.float32(88.0)
# 1 + r + r²/2! + … + r⁶/6!, highest first: within 2 ulp for |r| <= ln(2)/2.
EXP_COEFFICIENTS: Final = tuple(
    np.float32(1.0 / factorial) for factorial in (720, 120, 24, 6, 2, 1, 1)
)


def quantise(weight: Floats) -> tuple[Bytes, Floats]:
    """A matrix (outputs, inputs) as int8 with one scale per output."""
    scale = np.abs(weight).max(axis=1) / np.float32(WEIGHT_MOST)
    scale[scale == 0] = 1
    return np.rint(weight / scale[:, None]).astype(np.int8), scale.astype(np.float32)


def exp(a: Floats) -> Floats:
    """EXP, as the table says."""
    x = np.minimum(np.maximum(a, EXP_LEAST), EXP_MOST)
    k: Floats = np.rint(x * LOG2E)
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    total = np.full_like(r, EXP_COEFFICIENTS[0])
    for coefficient in EXP_COEFFICIENTS[1:]:
        total *= r
        total += coefficient
    result: Floats = np.ldexp(total, k.astype(np.int32))
    result[a < EXP_LEAST] = 0
    return result


def rsqrt(a: Floats) -> Floats:
    """RSQRT, as the table says."""
    root: Floats = np.divide(np.float32(1), np.sqrt(a))
    return root

"""Small functions on tiles that printed leaf functions call."""

import triton
import triton.language as tl


@triton.jit
def sign(x):
    """-1, 0 or 1."""
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def square(x):
    """x ** 2."""
    return x * x


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0, to the last digits: near 0 by the first terms of its series."""
    near, sum = tl.maximum(x, -0.5), x * 0.0 + 1.0
    for n in tl.static_range(14, 1, -1):
        sum = 1.0 + sum * near * (1.0 / n)
    return tl.where(x > -0.5, near * sum, tl.exp(x) - 1.0)


@triton.jit
def power(base, exponent):
    """base ** exponent for base >= 0, with 0 ** exponent = 0 (1 where the exponent is 0)."""
    safe = tl.where(base > 0, base, 1.0)
    return tl.where(base > 0, tl.exp(exponent * tl.log(safe)), tl.where(exponent == 0.0, 1.0, 0.0))


@triton.jit
def solve(matrix, right, BK: tl.constexpr):
    """x with matrix x = right, for a symmetric positive definite square: Gauss-Jordan elimination, column by column."""
    rows = tl.arange(0, BK)
    for pivot in range(0, BK):
        at = rows == pivot
        line = tl.sum(tl.where(at[:, None], matrix, 0.0), 0)
        column = tl.sum(tl.where(at[None, :], matrix, 0.0), 1)
        inverse = 1.0 / tl.sum(tl.where(at, line, 0.0), 0)
        factor = tl.where(at, 0.0, column * inverse)
        value = tl.sum(tl.where(at, right, 0.0), 0)
        matrix = matrix - factor[:, None] * line[None, :]
        right = right - factor * value
    diagonal = tl.sum(tl.where(rows[:, None] == rows[None, :], matrix, 0.0), 1)
    return right / diagonal

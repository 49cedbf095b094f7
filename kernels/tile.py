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
def inner(x, y, axis: tl.constexpr):
    """Sum of x y along an axis, the same bits in every lane that holds a copy of it.

    Where a lane holds one product, the compiler makes x y + (the neighbour's product) one fused step: of the two products one
    is rounded, in the neighbour's sum the other. A product fused to 0 is rounded before anything is added to it.
    """
    return tl.sum(tl.fma(x, y, 0.0), axis)


@triton.jit
def solve(matrix, right, BK: tl.constexpr):
    """x with matrix x = right, for a symmetric positive definite square: conjugate gradients, preconditioned by its diagonal,
    until the residual is as small as the type can tell.

    Many lanes hold a copy of every vector. The matrix meets one lane's p, and of r another's is measured: were they not equal
    to the last bit, steps would no longer shorten r once it is as small as their difference, but grow until they are NaN.
    """
    rows = tl.arange(0, BK)
    small: tl.constexpr = 1e-14 if matrix.dtype == tl.float64 else 1e-7
    scaling = 1.0 / tl.sum(tl.where(rows[:, None] == rows[None, :], matrix, 0.0), 1)
    right = tl.gather(right, rows, 0)  # one of the copies, which the sum that it is may have left uneven
    size = tl.max(tl.abs(right), 0)  # its square could underflow
    r = right / tl.where(size > 0, size, 1.0)
    x, p = r * 0.0, scaling * r  # NaN where right is
    rho = inner(r, p, 0)
    goal, count = small * small * rho, 0
    while (count < 4 * BK + 64) & ((rho > goal) | (rho != rho)):
        Ap = inner(matrix, p[None, :], 1)
        length = rho / inner(p, Ap, 0)
        x += length * p
        r -= length * Ap
        new = inner(scaling * r, r, 0)
        p = scaling * r + new / rho * p
        rho = new
        count += 1
    return size * x

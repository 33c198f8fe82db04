"""Device helpers that every kernel may use: elementary functions, and the scale maps of couplings.

The functions compute in the dtype of their argument, float32 or float64, to a few units in the last place. They need
nothing but exp, log, sqrt and rsqrt: libdevice differs between targets, and the interpreter has none. NaN in gives NaN
out: ``tl.maximum`` and its like would drop it, comparisons inside ``tl.where`` do not.
"""

# mypy: allow-untyped-defs
import triton
import triton.language as tl

__all__ = ["atan", "exp", "expm1", "exponential", "log1p", "narrow", "reciprocal", "scale_map", "tanh"]


@triton.jit
def exponential(x):
    # exp(x) as a power of two and a number near 0, exp(x) = power (1 + less_one): for -87 <= x <= 88, or 700 in float64.
    if x.dtype == tl.float64:
        t = tl.fma(x, 1.4426950408889634, 6755399441055744.0)  # as below
        n = t - 6755399441055744.0
        r = tl.fma(n, -1.90821492927058770002e-10, tl.fma(n, -6.93147180369123816490e-01, x))
        p = tl.zeros_like(r) + 1.0
        for i in tl.static_range(0, 12):
            p = tl.fma(p * r, 1.0 / (13 - i), 1.0)
        power = ((t.to(tl.int64, bitcast=True) + 1023) << 52).to(tl.float64, bitcast=True)
        less_one = r * p
    else:
        # Adding 1.5 * 2**23 rounds to an integer, and leaves it in the low bits of the sum.
        t = tl.fma(x, 1.4426950408889634, 12582912.0)
        n = t - 12582912.0
        r = tl.fma(n, 1.904654323148236e-09, tl.fma(n, -0.693147182464599609375, x))  # the inner one is exact
        p = tl.fma(r, 1.3950586438532637e-3, 8.368953223565857e-3)
        p = tl.fma(p, r, 4.166620438476464e-2)
        p = tl.fma(p, r, 1.6666518309979017e-1)
        p = tl.fma(p, r, 0.5)
        power = ((t.to(tl.int32, bitcast=True) + 127) << 23).to(tl.float32, bitcast=True)
        less_one = tl.fma(r * r, p, r)
    return power, less_one


@triton.jit
def exp(x):
    # A GPU computes exp of a float32 as 2**(x * log2(e)), and the rounding of that product grows with |x|: its error
    # reaches |x| units in the last place. Taking the power of two out first leaves |remainder| <= 0.35.
    if x.dtype == tl.float64:
        result = tl.exp(x)
    else:
        # Adding 1.5 * 2**23 rounds to an integer, and leaves it in the low bits of the sum.
        t = x * 1.4426950408889634 + 12582912.0
        t = tl.where(t < 12583039.0, t, 12583039.0)  # past 127 and -126 the remainder takes over, on to inf and to 0
        t = tl.where(t > 12582786.0, t, 12582786.0)
        n = t - 12582912.0
        # ln 2 in two parts, the first short enough for an exact product.
        remainder = (x - n * 0.693359375) - n * -2.12194440054690583e-4
        result = tl.exp(remainder) * ((t.to(tl.int32, bitcast=True) + 127) << 23).to(tl.float32, bitcast=True)
    return result


@triton.jit
def narrow(x, dtype: tl.constexpr):
    # From float64 to 16 bits by way of float32: no target and no interpreter does it in one step.
    return x.to(tl.float64) if dtype == tl.float64 else x.to(tl.float32).to(dtype)


@triton.jit
def reciprocal(x):
    # For 1 <= x < 1e18. A GPU divides float32 in ten instructions, most of them for ranges that do not occur here.
    return 1.0 / x if x.dtype == tl.float64 else tl.rsqrt(x * x)


@triton.jit
def odd_series(z, SIGN: tl.constexpr, TERMS: tl.constexpr):
    # The sum of SIGN**k z**(2k+1) / (2k+1): atanh for SIGN = 1, atan for SIGN = -1.
    square = z * z * SIGN
    total = tl.zeros_like(z) + 1.0 / (2 * TERMS - 1)
    for i in tl.static_range(1, TERMS):
        total = total * square + 1.0 / (2 * (TERMS - i) - 1)
    return z * total


@triton.jit
def log1p(x):
    # For -0.5 <= x <= 1: 2 atanh(x / (2 + x)), whose argument is at most 1/3. The truncation is 1e-8 and 2e-17.
    TERMS: tl.constexpr = 16 if x.dtype == tl.float64 else 7
    return 2.0 * odd_series(x * reciprocal(2.0 + x), 1, TERMS)


@triton.jit
def expm1(x):
    # Taylor's series where exp(x) - 1 would cancel. The truncation is 1e-8 and 2e-18.
    TERMS: tl.constexpr = 15 if x.dtype == tl.float64 else 8
    near = tl.where(tl.abs(x) < 0.5, x, 0.0)
    total = tl.zeros_like(x) + 1.0
    for i in tl.static_range(0, TERMS - 1):
        total = 1.0 + total * near * (1.0 / (TERMS - i))
    return tl.where(tl.abs(x) < 0.5, near * total, exp(x) - 1.0)


@triton.jit
def tanh(x):
    e = expm1(-2.0 * tl.abs(x))
    magnitude = -e / (2.0 + e)
    return tl.where(x < 0.0, -magnitude, magnitude)


@triton.jit
def atan(x):
    # atan(z) = pi/2 - atan(1/z) brings |z| under 1, the half angle, 2 atan(z / (1 + sqrt(1 + z^2))), under tan(pi/8).
    # The truncation is 7e-9 and 1e-17.
    TERMS: tl.constexpr = 20 if x.dtype == tl.float64 else 9
    magnitude = tl.abs(x)
    large = magnitude > 1.0
    z = tl.where(large, 1.0 / tl.where(large, magnitude, 1.0), magnitude)
    angle = 2.0 * odd_series(z / (1.0 + tl.sqrt(1.0 + z * z)), -1, TERMS)
    angle = tl.where(large, 1.5707963267948966 - angle, angle)
    return tl.where(x < 0.0, -angle, angle)


@triton.jit
def scale_map(u, KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    # (s, log s, d log s / du) of a ScaleMap. What the caller does not use costs nothing: the compiler drops it.
    if KIND == "sigmoid":
        v = u + A
        e = exp(-tl.abs(v))
        larger = reciprocal(1.0 + e)
        s, rest = tl.where(v < 0.0, e * larger, larger), tl.where(v < 0.0, larger, e * larger)  # rest = 1 - s
        if B == 0.0:
            log_s = tl.where(v < 0.0, v, 0.0) - log1p(e)
            slope = rest
        else:
            slope = s * rest / (s + B)
            s += B
            log_s = tl.log(s)
            if B < 1.0:  # log s is small where s is near 1
                above = v >= 0.0
                log_s = tl.where(above, log1p(tl.where(above, B - rest, 0.0)), log_s)
    elif KIND == "softplus":
        e = exp(-tl.abs(u))
        s = tl.where(u < 0.0, 0.0, u) + log1p(e) + A
        log_s = tl.log(s)
        slope = tl.where(u < 0.0, e, 1.0) / ((1.0 + e) * s)
        if A == 0.0:  # log s is u to the last digit, where s goes on to 0
            log_s = tl.where(u < -40.0, u, log_s)
            slope = tl.where(u < -40.0, 1.0, slope)
    else:
        if KIND == "exp":
            log_s = u
            slope = tl.zeros_like(u) + 1.0
        elif KIND == "tanh":
            e = exp(-2.0 * tl.abs(u / A))
            log_s = A * tanh(u / A)
            slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
        elif KIND == "atan":
            log_s = (0.636 * A) * atan(u)
            slope = (0.636 * A) / (1.0 + u * u)
        else:
            tl.static_assert(KIND == "soft_clip")
            MOST: tl.constexpr = A * (1e300 if u.dtype == tl.float64 else 1e30)  # an infinite u would give inf / inf
            u = tl.where(u > MOST, MOST, tl.where(u < -MOST, -MOST, u))
            clip = 1.0 + tl.abs(u / A)
            log_s = u / clip
            slope = 1.0 / (clip * clip)
        s = exp(log_s)
    return s, log_s, slope

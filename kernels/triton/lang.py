"""Device helpers that every kernel may use: elementary functions, and the scale maps of couplings.

The functions compute in the dtype of their argument, float32 or float64, to a unit or two in the last place. libdevice differs
between targets, and the interpreter has none; a GPU's own exp2, rsqrt and quotients are off by two units. So there are sums and
products here, fused where it matters, and rsqrt where what it lost is made good. NaN in gives NaN out: ``tl.maximum`` and
its like would drop it, comparisons inside ``tl.where`` do not.
"""

# mypy: allow-untyped-defs
import triton
import triton.language as tl

__all__ = [
    "atan",
    "divide",
    "exp",
    "expm1",
    "exponential",
    "log",
    "log1p",
    "narrow",
    "quotient",
    "reciprocal",
    "scale_map",
    "tanh",
]


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
        t = tl.fma(x, 1.4426950408889634, 12582912.0)  # as in exponential
        t = tl.where(t < 12583039.0, t, 12583039.0)  # past 127 and -126 the remainder takes over, on to inf and to 0
        t = tl.where(t > 12582786.0, t, 12582786.0)
        n = t - 12582912.0
        # ln 2 in two parts, the first short enough for an exact product.
        remainder = tl.fma(n, 2.12194440054690583e-4, tl.fma(n, -0.693359375, x))
        result = tl.exp(remainder) * ((t.to(tl.int32, bitcast=True) + 127) << 23).to(tl.float32, bitcast=True)
    return result


@triton.jit
def log(x):
    # For normal positive numbers.
    if x.dtype == tl.float64:
        result = tl.log(x)
    else:
        bits = x.to(tl.int32, bitcast=True)
        power = (bits - 0x3F3504F3) & -0x800000  # brings the rest between the roots of 1/2 and 2
        f = (bits - power).to(tl.float32, bitcast=True) - 1.0
        n = power.to(tl.float32) * 1.1920928955078125e-07
        p = tl.fma(f, -0.07634429633617401, 0.12761549651622772)
        p = tl.fma(p, f, -0.131601944565773)
        p = tl.fma(p, f, 0.14201761782169342)
        p = tl.fma(p, f, -0.16623356938362122)
        p = tl.fma(p, f, 0.20001226663589478)
        p = tl.fma(p, f, -0.250008225440979)
        p = tl.fma(p, f, 0.3333333134651184)
        p = tl.fma(p, f, -0.5)
        result = tl.fma(n, 0.693359375, tl.fma(f * f, p, tl.fma(n, -2.12194440e-4, f)))
    return result


@triton.jit
def narrow(x, dtype: tl.constexpr):
    # From float64 to 16 bits by way of float32: no target and no interpreter does it in one step.
    return x.to(tl.float64) if dtype == tl.float64 else x.to(tl.float32).to(dtype)


@triton.jit
def reciprocal(x):
    # For 1e-18 < x < 1e18, to two units. A GPU divides float32 in ten instructions, most for ranges that do not occur here.
    return 1.0 / x if x.dtype == tl.float64 else tl.rsqrt(x * x)


@triton.jit
def quotient(a, b):
    # a / b to the last digit, for finite a and 1e-18 < b < 1e18.
    if a.dtype == tl.float64:
        result = a / b
    else:
        inverse = reciprocal(b)
        result = a * inverse
        result = tl.fma(tl.fma(-result, b, a), inverse, result)
    return result


@triton.jit
def divide(x, BY: tl.constexpr, POWER: tl.constexpr = False):
    # x / BY as IEEE arithmetic rounds it, for finite x, BY maybe a POWER of two. After one correction the quotient is off by
    # less than a unit, and then the next one rounds it as it should be (Markstein 1990).
    if x.dtype == tl.float64:
        result = x / BY
    else:
        INVERSE: tl.constexpr = 1.0 / BY
        result = x * INVERSE
        if not POWER:
            result = tl.fma(tl.fma(result, -BY, x), INVERSE, result)
            result = tl.fma(tl.fma(result, -BY, x), INVERSE, result)
    return result


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
    # For -0.5 <= x <= 1: 2 atanh(x / (2 + x)), whose argument is at most 1/3.
    z = quotient(x, 2.0 + x)
    if x.dtype == tl.float64:
        result = 2.0 * odd_series(z, 1, 16)
    else:
        square = z * z
        p = tl.fma(square, 0.1401496369970916, 0.13999057563130599)
        p = tl.fma(p, square, 0.20010878029945728)
        p = tl.fma(p, square, 0.33333206127270576)
        result = 2.0 * tl.fma(z * square, p, z)
    return result


@triton.jit
def expm1(x):
    MOST: tl.constexpr = 700.0 if x.dtype == tl.float64 else 87.0
    power, less_one = exponential(tl.where(x > MOST, MOST, tl.where(x < -MOST, -MOST, x)))
    return tl.where(x > 40.0, exp(x), tl.fma(power, less_one, power - 1.0))


@triton.jit
def tanh(x):
    MOST: tl.constexpr = 700.0 if x.dtype == tl.float64 else 87.0
    v = -2.0 * tl.abs(x)
    power, less_one = exponential(tl.where(v < -MOST, -MOST, v))
    e = tl.fma(power, less_one, power - 1.0)
    magnitude = quotient(-e, 2.0 + e)
    return tl.where(x < 0.0, -magnitude, magnitude)


@triton.jit
def atan(x):
    # atan(z) = pi/2 - atan(1/z) brings |z| under 1; in float64 the half angle, 2 atan(z / (1 + sqrt(1 + z^2))), brings it under
    # tan(pi/8), where the truncation is 1e-17.
    magnitude = tl.abs(x)
    large = magnitude > 1.0
    magnitude = tl.where(magnitude > 1e17, 1e17, magnitude)
    z = tl.where(large, quotient(tl.zeros_like(x) + 1.0, tl.where(large, magnitude, 1.0)), magnitude)
    if x.dtype == tl.float64:
        angle = 2.0 * odd_series(z / (1.0 + tl.sqrt(1.0 + z * z)), -1, 20)
    else:
        square = z * z
        p = tl.fma(square, -0.0018271964447430023, 0.011064346636917535)
        p = tl.fma(p, square, -0.03145548381827918)
        p = tl.fma(p, square, 0.05823428478410293)
        p = tl.fma(p, square, -0.08419440574312834)
        p = tl.fma(p, square, 0.10957568697447871)
        p = tl.fma(p, square, -0.14265243707767528)
        p = tl.fma(p, square, 0.19998638438236113)
        p = tl.fma(p, square, -0.3333330185975513)
        angle = tl.fma(z * square, p, z)
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
            u *= 1.0 / A
            e = exp(-2.0 * tl.abs(u))
            log_s = A * tanh(u)
            inverse = reciprocal(1.0 + e)
            slope = (4.0 * e) * (inverse * inverse)
        elif KIND == "atan":
            log_s = (0.636 * A) * atan(u)
            slope = (0.636 * A) / (1.0 + u * u)
        else:
            tl.static_assert(KIND == "soft_clip")
            MOST: tl.constexpr = A * 1e17  # an infinite u would give inf / inf
            beyond, farthest = tl.abs(u) > MOST, A / tl.abs(u)
            u = tl.where(u > MOST, MOST, tl.where(u < -MOST, -MOST, u))
            clip = 1.0 + divide(tl.abs(u), A)
            log_s = quotient(u, clip)
            inverse = tl.where(beyond, farthest, reciprocal(clip))
            slope = inverse * inverse
        s = exp(log_s)
    return s, log_s, slope

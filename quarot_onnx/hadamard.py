# SPDX-License-Identifier: Apache-2.0
"""Orthonormal Hadamard matrices for every order, Kronecker plans, fast transforms.

A Hadamard matrix of order n has entries ±1 and H Hᵀ = n I; H / √n is a rotation that spreads one
spike over n features, so its peak shrinks by √n. Orders other than 1, 2 and multiples of 4 are
impossible. Vectors are rows throughout: y = x H, and a linear y = x W absorbs a rotated input as
W -> Hᵀ W. A Hadamard matrix is in general not symmetric: the inverse is Hᵀ, never H.

A transform of n features is planned as x (I ⊗ A ⊗ B), with A and B Kronecker products of canonical
matrices (``hadamard_matrix``): two small matrix products, n (a + b) multiply-adds, and not n².

Sources: Sylvester 1867; Paley 1933 (On orthogonal matrices); Williamson 1944 (Hadamard's
determinant theorem and the sum of four squares); QuaRot, arXiv 2404.00456, for where they are used.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Final, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.errors import UnsupportedModelError

Construction = Literal["sylvester", "paley1", "paley2", "williamson", "kronecker"]
Kind = Literal["full", "block", "padded", "none"]
Policy = Literal["full", "block", "pad"]
Float = TypeVar("Float", bound=np.floating[Any])

MAX_FACTOR: Final = 44
"""The largest factor, powers of two apart, that a plan takes while it has a choice."""

LARGEST_FACTOR: Final = 1024
"""The largest factor, powers of two apart, of any plan: a larger one costs as much as a linear."""

_LARGEST_DENSE: Final = 128  # up to here BLAS runs one product faster than batches of small ones
_LARGEST_PRODUCT: Final = 1 << 18  # multiply-adds; OpenBLAS takes one thread up to here

# First rows of symmetric circulants A, B, C, D of order n/4, A² + B² + C² + D² = n I (Williamson
# 1944, who gave 172; 92 is Baumert, Golomb and Hall 1962): the orders up to 172 that no other
# construction here reaches. The tests check every product in integers.
_WILLIAMSON: Final = {
    92: (
        "+-+--+++++----+++++--+-",
        "+-+++--++-+--+-++--+++-",
        "+--++-+-+------+-+-++--",
        "+++++-++---++---++-++++",
    ),
    116: (
        "++-+++--+-++------++-+--+++-+",
        "+--+++--++-+------+-++--+++--",
        "++-+-+++-++-+----+-++-+++-+-+",
        "+++-+---++++-++++-++++---+-++",
    ),
    156: (
        "+++--+-+-----+--++----++--+-----+-+--++",
        "++++---+--++----+-+--+-+----++--+---+++",
        "+++--++-+---+-+--+----+--+-+---+-++--++",
        "+---++-+-+-----+++-++-+++-----+-+-++---",
    ),
    172: (
        "+---++--++++-+-+++-++--++-+++-+-++++--++---",
        "++-++++++----+-+--++-++-++--+-+----++++++-+",
        "+++-+-++--+-+-++++-+----+-++++-+-+--++-+-++",
        "++---++++-+--+--++--------++--+--+-++++---+",
    ),
}


# Matrices


@lru_cache(maxsize=64)
def hadamard_matrix(order: int) -> NDArray[np.int8]:
    """The canonical Hadamard matrix H of an order: entries ±1, H @ H.T == order * I exactly.

    The matrix of an order never changes: files name their factors by order alone. See
    ``construction`` for which one it is. It is cached and read-only, and often not symmetric.

    Returns:
        H: int8 [order, order].

    Raises:
        UnsupportedModelError: no matrix of this order exists, or none is known here.
    """
    match construction(order):
        case "sylvester":
            H = np.ones((1, 1), np.int8)
            while len(H) < order:
                H = np.block([[H, H], [H, -H]])
        case "paley1":
            S = _conference_matrix(order - 1, border=-1)
            H = S + np.eye(order, dtype=np.int8)
        case "paley2":
            S = _conference_matrix(order // 2 - 1, border=1)
            off_diagonal = np.array([[1, 1], [1, -1]], np.int8)
            diagonal = np.array([[1, -1], [-1, -1]], np.int8)
            H = np.kron(S, off_diagonal) + np.kron(np.eye(len(S), dtype=np.int8), diagonal)
        case "williamson":
            A, B, C, D = (_circulant(row) for row in _WILLIAMSON[order])
            H = np.block([[A, B, C, D], [-B, A, -D, C], [-C, D, A, -B], [-D, -C, B, A]])
        case "kronecker":
            factor = _kronecker_factor(order)
            H = np.kron(hadamard_matrix(order // factor), hadamard_matrix(factor))
    H.setflags(write=False)
    return H


@cache
def construction(order: int) -> Construction:
    """The construction behind ``hadamard_matrix(order)``: the first that applies of these.

    ``sylvester`` (powers of two), ``paley1`` (order - 1 is a prime power, 3 mod 4), ``paley2``
    (order / 2 - 1 is a prime power, 1 mod 4), ``williamson`` (four circulants, by table) and
    ``kronecker`` (H_{order/f} ⊗ H_f with the smallest f possible).

    Raises:
        UnsupportedModelError: no matrix of this order exists, or none is known here.
    """
    if not _is_possible(order):
        raise UnsupportedModelError(
            f"hadamard: order={order} is not 1, 2 or a multiple of 4, so no Hadamard matrix exists;"
            " use a block-diagonal plan or a dense orthogonal matrix"
        )
    base = _base_construction(order)
    if base is not None:
        return base
    if _kronecker_factor(order):
        return "kronecker"
    raise UnsupportedModelError(
        f"hadamard: order={order} has no Sylvester, Paley, Williamson or Kronecker construction;"
        " use a block-diagonal plan or a dense orthogonal matrix"
    )


@cache
def is_constructible(order: int) -> bool:
    """Whether ``hadamard_matrix`` has this order; nothing is built."""
    return _is_possible(order) and (
        _base_construction(order) is not None or _kronecker_factor(order) != 0
    )


def _is_possible(order: int) -> bool:
    return order in (1, 2) or (order > 0 and order % 4 == 0)


@cache
def _base_construction(order: int) -> Construction | None:
    """The construction of a possible order that is no Kronecker product, if there is one."""
    if order & (order - 1) == 0:
        return "sylvester"
    if (order - 1) % 4 == 3 and _prime_power(order - 1):
        return "paley1"
    if (order // 2 - 1) % 4 == 1 and _prime_power(order // 2 - 1):
        return "paley2"
    if order in _WILLIAMSON:
        return "williamson"
    return None


@cache
def _kronecker_factor(order: int) -> int:
    """The smallest f > 1 with f and order / f both constructible, 0 where there is none."""
    for factor in _divisors(order)[1:-1]:
        if is_constructible(factor) and is_constructible(order // factor):
            return factor
    return 0


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) where q = p^k with p prime and k >= 1, else None."""
    if q < 2:
        return None
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q //= p
        k += 1
    return (p, k) if q == 1 else None


def _conference_matrix(q: int, *, border: int) -> NDArray[np.int8]:
    """Paley's S = [[0, 1], [border, Q]] over GF(q), with S Sᵀ = q I: int8 [q + 1, q + 1].

    Q[a, b] = χ(a - b), with χ the quadratic character of GF(q): skew for q = 3 mod 4, which wants
    ``border`` -1, symmetric for q = 1 mod 4, which wants 1.
    """
    field = _prime_power(q)
    assert field is not None
    p, k = field
    element = np.arange(q)
    difference = np.zeros((q, q), np.int64)
    for place in (p**i for i in range(k)):
        digit = element // place % p
        difference += place * ((digit[:, None] - digit) % p)
    S = np.ones((q + 1, q + 1), np.int8)
    S[0, 0], S[1:, 0] = 0, border
    S[1:, 1:] = _quadratic_character(p, k)[difference]
    return S


def _quadratic_character(p: int, k: int) -> NDArray[np.int8]:
    """χ over GF(p^k): 0 at 0, 1 at the squares, -1 elsewhere; int8 [p^k].

    Element Σ c_i x^i has index Σ c_i p^i. The field is GF(p)[x] modulo the first monic polynomial
    (in the order of its coefficients) for which x generates the multiplicative group; the squares
    are then the even powers of x.
    """
    q = p**k
    for reduction in itertools.product(range(p), repeat=k):  # x^k = Σ reduction_i x^i
        character = np.zeros(q, np.int8)
        power = (1, *[0] * (k - 1))
        for exponent in range(q - 1):
            index = sum(c * p**i for i, c in enumerate(power))
            if index == 0 or character[index]:
                break  # x has a smaller order: try the next polynomial
            character[index] = -1 if exponent % 2 else 1
            shifted, carry = (0, *power[:-1]), power[-1]
            power = tuple((s + carry * r) % p for s, r in zip(shifted, reduction, strict=True))
        else:
            return character
    raise AssertionError(f"GF({p}^{k}) has no primitive polynomial")


def _circulant(row: str) -> NDArray[np.int8]:
    """The circulant matrix of a first row of '+' and '-': int8 [n, n]."""
    first = np.array([1 if sign == "+" else -1 for sign in row], np.int8)
    return np.stack([np.roll(first, shift) for shift in range(len(row))])


# Plans


@dataclass(frozen=True)
class Plan:
    """How n features are rotated: y = x (I ⊗ A ⊗ B), with A ⊗ B = H_f1 ⊗ H_f2 ⊗ ... / √block_size.

    ``plan`` makes the best one; an ONNX node's ``factors`` attribute gives it back.

    Attributes:
        size: n, the features that enter.
        factors: orders of the canonical matrices of one block, from the slowest index to the
            fastest; empty for the identity.
        padded_size: the features that leave; more than ``size`` where zeros are appended first.
        reason: for a person, why the rotation is not full; empty where it is.

    Raises:
        UnsupportedModelError: the factors' product does not divide ``padded_size``, or that is
            less than ``size``.
    """

    size: int
    factors: tuple[int, ...]
    padded_size: int
    reason: str = ""

    def __post_init__(self) -> None:
        if self.size < 1 or self.padded_size < self.size or self.padded_size % self.block_size:
            raise UnsupportedModelError(
                f"hadamard: factors {self.factors} do not make blocks of {self.padded_size}"
                f" features for n={self.size}; use the factors of hadamard.plan({self.size})"
            )

    @property
    def block_size(self) -> int:
        """Features that are mixed with each other: the product of the factors."""
        return math.prod(self.factors)

    @property
    def kind(self) -> Kind:
        """``full`` (one block), ``block`` (several), ``padded`` (with zeros) or ``none``."""
        if self.padded_size != self.size:
            return "padded"
        if self.block_size == self.size:
            return "full"
        return "block" if self.factors else "none"

    @property
    def split(self) -> tuple[int, int]:
        """(a, b), the orders of A and B: the prefix of the factors with the smallest a + b."""
        return math.prod(self.factors[: self._cut]), math.prod(self.factors[self._cut :])

    @property
    def _cut(self) -> int:
        """How many of the factors make A."""
        prefixes = [math.prod(self.factors[:i]) for i in range(len(self.factors) + 1)]
        costs = [prefix + self.block_size // prefix for prefix in prefixes]
        return costs.index(min(costs))

    @property
    def cost(self) -> int:
        """Multiply-adds per token of the two products: n (a + b); 0 for the identity."""
        return self.padded_size * sum(self.split) if self.factors else 0

    @property
    def suppression(self) -> float:
        """How many times smaller the peak of a single spike becomes: √block_size."""
        return math.sqrt(self.block_size)

    def matrices(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """A [a, a] and B [b, b]: orthonormal, float64."""
        return _orthonormal(self.factors[: self._cut]), _orthonormal(self.factors[self._cut :])

    def matrix(self) -> NDArray[np.float64]:
        """A ⊗ B, one block: orthonormal, float64 [block_size, block_size]."""
        return _orthonormal(self.factors)

    def apply(self, x: NDArray[Float], axis: Literal[-1, 0] = -1) -> NDArray[Float]:
        """Rotates an axis: x R, for R = I ⊗ A ⊗ B (its first ``size`` rows, where it is padded).

        On the last axis: x [..., size] -> x R [..., padded_size]. On axis 0 of a matrix:
        W [size, m] -> Rᵀ W [padded_size, m], which keeps a linear's result: (x R) (Rᵀ W) = x W.

        Args:
            x: float32 or float64, and the result has its dtype.
            axis: -1, or 0 for a matrix.

        Raises:
            UnsupportedModelError: x has another dtype, or another size along the axis.
        """
        _require_float(x)
        if axis != -1 and (axis, x.ndim) != (0, 2):
            raise UnsupportedModelError(
                f"hadamard: axis={axis} of an array of shape {x.shape} cannot be rotated;"
                " use the last axis, or axis 0 of a matrix"
            )
        if x.ndim == 0 or x.shape[axis] != self.size:
            raise UnsupportedModelError(
                f"hadamard: axis {axis} of an array of shape {x.shape} does not have the"
                f" {self.size} features of the plan; use the plan of that axis' own size"
            )
        A, B = (matrix.astype(x.dtype) for matrix in self.matrices())
        if len(A) * len(B) <= _LARGEST_DENSE:
            A, B = np.ones((1, 1), x.dtype), np.kron(A, B)
        if self.size < self.padded_size:
            widths = [(0, 0)] * x.ndim
            widths[axis] = (0, self.padded_size - self.size)
            x = np.pad(x, widths)
        after = 1 if axis == -1 else x.shape[1]
        return _mix(_mix(x, B, after), A, len(B) * after).reshape(x.shape)


def plan(n: int, *, max_factor: int = MAX_FACTOR, policy: Policy = "block") -> Plan:
    """The cheapest full rotation of n features, or else what ``policy`` says.

    A full plan takes the Kronecker factors with the smallest a + b (``Plan.split``) among those
    of at most ``max_factor``; where the order needs a larger one, the smallest that works, up to
    ``LARGEST_FACTOR``. A power of two is not bound by this: it is a product of H_2, and a fast
    transform needs no matrix for it. Ties go to the cheaper chain of small factors.

    Args:
        n: the number of features, 1 or more.
        max_factor: the largest factor to take, powers of two apart, where there is a choice.
        policy: what to do where no full plan exists. ``block`` rotates blocks of the largest
            divisor of n that has a plan; ``pad`` appends zeros up to the next size that has one
            within ``max_factor``; ``full`` leaves the features as they are (kind ``none``).

    Returns:
        A plan for every n. Only one of kind ``full`` mixes all n features and keeps their number.

    Raises:
        UnsupportedModelError: n is not positive.
    """
    if n < 1:
        raise UnsupportedModelError(f"hadamard: n={n} features cannot be rotated; give n >= 1")
    factors = _cheapest_factors(n, max_factor)
    if factors is not None:
        return Plan(n, factors, n)
    why = (
        f"no Hadamard matrix of order {n} is known with factors up to {LARGEST_FACTOR}"
        if _is_possible(n)
        else f"n={n} is odd, so no Hadamard matrix has this order"
        if n % 2
        else f"n={n} is not a multiple of 4, so no Hadamard matrix has this order"
    )
    if policy == "pad":
        size = _next_size(n, max_factor)
        factors = _cheapest_factors(size, max_factor)
        assert factors is not None
        return Plan(n, factors, size, f"{why}; padded with {size - n} zeros to {size}")
    if policy == "block":
        twos = n & -n
        block, factors = next(
            (odd * twos, factors)
            for odd in reversed(_divisors(n // twos))
            if (factors := _cheapest_factors(odd * twos, max_factor)) is not None
        )
        if block > 1:
            return Plan(n, factors, n, f"{why}; rotated as {n // block} blocks of {block}")
    return Plan(n, (), n, f"{why}; left unrotated")


@cache
def _cheapest_factors(n: int, max_factor: int) -> tuple[int, ...] | None:
    """The factors of the best full plan for n features, if there is one."""
    best: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    twos = n & -n
    for cores in _core_products(n // twos, twos.bit_length() - 1, 1):
        spare = n // math.prod(cores)  # a power of two, for both sides to share
        for in_a in itertools.product((True, False), repeat=len(cores)):
            left = tuple(itertools.compress(cores, in_a))
            right = tuple(itertools.compress(cores, (not side for side in in_a)))
            core_a, core_b = math.prod(left), math.prod(right)
            for m in range(spare.bit_length()):
                two_a, two_b = 1 << m, spare >> m
                rank = (
                    max((max_factor, *cores)),
                    core_a * two_a + core_b * two_b,
                    sum(cores) + 2 * (spare.bit_length() - 1),  # a butterfly per factor of two
                    -core_a,
                    two_a,
                )
                factors = (*left, two_a, *right, two_b)
                if best is None or (rank, factors) < best:
                    best = rank, factors
    return None if best is None else tuple(factor for factor in best[1] if factor > 1)


def _core_products(odd: int, twos: int, smallest: int) -> Iterator[tuple[int, ...]]:
    """Every product of cores (``_core``) with this odd part and at most so many factors of two.

    The odd parts of the cores do not decrease, from ``smallest`` on.
    """
    if odd == 1:
        yield ()
    for part in _divisors(odd):
        core = _core(part) if part >= max(3, smallest) else 0
        used = (core // part).bit_length() - 1
        if core and used <= twos:
            for rest in _core_products(odd // part, twos - used, part):
                yield (core, *rest)


def _next_size(n: int, max_factor: int) -> int:
    """The smallest size from n on that is a product of powers of two and cores to max_factor."""
    products = [1]
    for odd in range(3, max_factor // 4 + 1, 2):
        core = _core(odd)
        if 0 < core <= max_factor:
            powers = [core**i for i in range(n.bit_length()) if core**i < 2 * n]
            products = [p * power for p in products for power in powers if p * power < 2 * n]
    return min(product << ((n - 1) // product).bit_length() for product in products)


@cache
def _core(odd: int) -> int:
    """The smallest order, not a Kronecker product, of this odd part; 0 past ``LARGEST_FACTOR``."""
    order = 4 * odd
    while order <= LARGEST_FACTOR:
        if _base_construction(order):
            return order
        order *= 2
    return 0


@cache
def _divisors(n: int) -> tuple[int, ...]:
    """Every divisor of n, ascending."""
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return (*low, *(n // d for d in reversed(low) if d * d != n))


def _orthonormal(factors: tuple[int, ...]) -> NDArray[np.float64]:
    """H_f1 ⊗ H_f2 ⊗ ... / √order: float64 [order, order], each entry rounded once."""
    signs = np.ones((1, 1), np.int8)
    for factor in factors:
        signs = np.kron(signs, hadamard_matrix(factor))
    return signs / math.sqrt(len(signs))


def _mix(x: NDArray[Float], M: NDArray[Float], after: int) -> NDArray[Float]:
    """Mᵀ times the middle axis of x seen as [-1, m, after].

    As many products, each too small for BLAS to share among threads: those would wait for each
    other longer than they work, and the last bits could depend on their number.
    """
    m = len(M)
    if m == 1:
        return x * M
    columns = 1 << max(3, (_LARGEST_PRODUCT // m**2).bit_length() - 1)
    if after == 1:
        rows = math.gcd(x.size // m, columns)
        return x.reshape(-1, rows, m) @ M
    y = np.empty((x.size // (m * after), m, after), x.dtype)
    width = math.gcd(after, columns)

    def pieces(array: NDArray[Float]) -> NDArray[Float]:
        return array.reshape(len(y), m, after // width, width).swapaxes(1, 2)

    np.matmul(M.T, pieces(x), out=pieces(y))
    return y


def _require_float(x: NDArray[Any]) -> None:
    if x.dtype not in (np.float32, np.float64):
        raise UnsupportedModelError(
            f"hadamard: dtype={x.dtype} is not float32 or float64; convert the array first"
        )


# Fast transform, randomness


def fwht(x: NDArray[Float]) -> NDArray[Float]:
    """The Walsh-Hadamard transform x H / √n of the last axis: n log2(n) additions, H Sylvester's.

    Args:
        x: float32 or float64 [..., n], with n a power of two; it is left as it is.

    Returns:
        An array of the same shape and dtype; applying it twice gives x back.

    Raises:
        UnsupportedModelError: n is not a power of two, or x has another dtype.
    """
    _require_float(x)
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise UnsupportedModelError(
            f"hadamard: n={n} is not a power of two; use hadamard.plan({n}).apply"
        )
    y = x
    for stride in (1 << m for m in range(n.bit_length() - 1)):
        even, odd = np.moveaxis(y.reshape(-1, 2, stride), 1, 0)
        y = np.stack((even + odd, even - odd), axis=1)
    return y.reshape(x.shape) * x.dtype.type(1 / math.sqrt(n))


def randomized_signs(n: int, seed: int, site: str = "") -> NDArray[np.float64]:
    """Random signs D of a randomized Hadamard x -> (x D) H: float64 [n] of ±1.

    The same on every machine and NumPy: the top bits of PCG64's raw stream, never of a
    distribution. ``site`` names what is rotated and gives each place a stream of its own.

    Raises:
        UnsupportedModelError: the seed is negative.
    """
    raw = _bit_generator(seed, site).random_raw(n)
    return 1.0 - 2.0 * (raw >> np.uint64(63)).astype(np.float64)


def random_orthogonal(n: int, seed: int, site: str = "") -> NDArray[np.float64]:
    """A Haar-distributed orthogonal matrix: float64 [n, n].

    QR of a Gaussian matrix with the signs of R's diagonal moved into Q (Mezzadri 2007). It is
    reproducible on one machine; its last bits depend on the LAPACK that NumPy uses.

    Raises:
        UnsupportedModelError: the seed is negative.
    """
    gaussian = np.random.Generator(_bit_generator(seed, site)).standard_normal((n, n))
    Q, R = np.linalg.qr(gaussian)
    return Q * np.where(np.diagonal(R) < 0, -1.0, 1.0)


def _bit_generator(seed: int, site: str) -> np.random.PCG64:
    if seed < 0:
        raise UnsupportedModelError(f"hadamard: seed={seed} is negative; give 0 or more")
    site_entropy = int.from_bytes(hashlib.sha256(site.encode()).digest(), "little")
    return np.random.PCG64(np.random.SeedSequence([seed, site_entropy]))

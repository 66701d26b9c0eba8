"""Eight outputs of a matrix product for up to 32 rows at a time, as vector code.

The rows of x stand side by side in one vector, a *lane* each, and a weight is broadcast to all of them; the next
weights are on their way from memory in the meantime. So a matrix is read once, in order and as it lies, at nearly the
speed of memory. A single row is multiplied along the matrix's own rows instead. Written as LLVM's vectors, which numba
compiles for whatever processor there is.
"""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import binding, ir
from numba import extending, njit, types
from numba.core import cgutils

intrinsic: Any = extending.intrinsic
carray: Any = numba.carray  # pyright: ignore[reportPrivateImportUsage]
"""An array at a pointer."""

TILE = 8
"""Weights of so many outputs are read side by side, each summed in a register of its own."""
MOST_LANES = 32 if binding.get_host_cpu_features().get("avx512f") else 8
"""How many rows the registers of this processor hold."""
_LINE = 16
"""Floats in a cache line."""
_FLOAT, _INT, _INT32 = ir.FloatType(), ir.IntType(64), ir.IntType(32)
_BYTES = ir.IntType(8).as_pointer()


def _function(b: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    return cgutils.get_or_insert_function(b.module, ir.FunctionType(result, arguments), name)


def _fetch(b: Any, address: Any) -> None:
    """Ask for a cache line that will be read."""
    function = _function(b, "llvm.prefetch.p0", ir.VoidType(), [_BYTES, _INT32, _INT32, _INT32])
    b.call(function, [b.bitcast(address, _BYTES), _INT32(0), _INT32(3), _INT32(1)])


def _loop(b: Any, first: Any, stop: Any, step: int, sums: list[Any], body: Any) -> list[Any]:
    """sums = body(i, sums) for i from `first` in steps, while i < stop."""
    before, head, inside, after = b.block, *(b.append_basic_block() for _ in range(3))
    b.branch(head)
    b.position_at_end(head)
    at, running = b.phi(_INT), [b.phi(value.type) for value in sums]
    for phi, value in zip((at, *running), (first, *sums), strict=True):
        phi.add_incoming(value, before)
    b.cbranch(b.icmp_signed("<", at, stop), inside, after)
    b.position_at_end(inside)
    for phi, value in zip((at, *running), (b.add(at, _INT(step)), *body(at, running)), strict=True):
        phi.add_incoming(value, b.block)
    b.branch(head)
    b.position_at_end(after)
    return running


def _tile(lanes: int, outputs: int) -> Any:
    """A compiled function: out (outputs, lanes) = W (outputs, k) x (k, lanes), all given by address."""
    build = _dots if lanes == 1 else _columns

    @intrinsic
    def tile(typing: Any, weight: Any, x: Any, k: Any, out: Any) -> Any:
        def code(context: Any, b: Any, signature: Any, args: Any) -> Any:
            k = args[2]
            weight, x, out = (b.inttoptr(args[i], _FLOAT.as_pointer()) for i in (0, 1, 3))
            rows = [b.gep(weight, [b.mul(k, _INT(m))]) for m in range(outputs)]
            build(b, rows, b.mul(k, _INT(outputs)), x, k, b.sub(k, b.srem(k, _INT(_LINE))), out, lanes)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, types.intp, types.intp), code

    return tile


def _columns(b: Any, rows: list[Any], tile: Any, x: Any, k: Any, whole: Any, out: Any, lanes: int) -> None:
    """Many lanes: a vector of x per position, a weight broadcast to it. The next tile begins `tile` floats on."""
    vector = ir.VectorType(_FLOAT, lanes)
    undefined, broadcast = ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(_INT32, lanes), [0] * lanes)
    fma = _function(b, f"llvm.fma.v{lanes}f32", vector, [vector] * 3)

    def add(width: int) -> Any:
        def body(at: Any, sums: list[Any]) -> list[Any]:
            sums = list(sums)
            next_tile = b.gep(rows[0], [b.add(tile, b.mul(at, _INT(len(rows))))])
            for line in range(len(rows) if width > 1 else 0):  # in the order in which they lie
                _fetch(b, b.gep(next_tile, [_INT(line * _LINE)]))
            for i in range(width):
                place = b.add(at, _INT(i))
                column = b.load(b.bitcast(b.gep(x, [b.mul(place, _INT(lanes))]), vector.as_pointer()), align=4)
                for m, row in enumerate(rows):
                    one = b.insert_element(undefined, b.load(b.gep(row, [place])), _INT32(0))
                    sums[m] = b.call(fma, [b.shuffle_vector(one, undefined, broadcast), column, sums[m]])
            return sums

        return body

    sums = _loop(b, _INT(0), whole, _LINE, [ir.Constant(vector, [0.0] * lanes)] * len(rows), add(_LINE))
    for m, total in enumerate(_loop(b, whole, k, 1, sums, add(1))):
        b.store(total, b.bitcast(b.gep(out, [_INT(m * lanes)]), vector.as_pointer()), align=4)


def _dots(b: Any, rows: list[Any], tile: Any, x: Any, k: Any, whole: Any, out: Any, lanes: int) -> None:
    """One lane: vectors along the positions, summed up at the end."""
    vector = ir.VectorType(_FLOAT, _LINE)
    fma, fma1 = (
        _function(b, f"llvm.fma.{name}", kind, [kind] * 3) for name, kind in (("v16f32", vector), ("f32", _FLOAT))
    )

    def add(at: Any, sums: list[Any]) -> list[Any]:
        for row in rows:
            _fetch(b, b.gep(row, [b.add(tile, at)]))
        given, *weights = (b.load(b.bitcast(b.gep(p, [at]), vector.as_pointer()), align=4) for p in (x, *rows))
        return [b.call(fma, [weight, given, total]) for weight, total in zip(weights, sums, strict=True)]

    def add_one(at: Any, sums: list[Any]) -> list[Any]:
        given, *weights = (b.load(b.gep(p, [at])) for p in (x, *rows))
        return [b.call(fma1, [weight, given, total]) for weight, total in zip(weights, sums, strict=True)]

    def folded(total: Any) -> Any:
        """The sum of a vector's entries: its halves, their halves."""
        width = _LINE
        while width > 1:
            width //= 2
            parts = [
                b.shuffle_vector(
                    total, total, ir.Constant(ir.VectorType(_INT32, width), [*range(start, start + width)])
                )
                for start in (0, width)
            ]
            total = b.fadd(*parts)
        return b.extract_element(total, _INT32(0))

    sums = _loop(b, _INT(0), whole, _LINE, [ir.Constant(vector, [0.0] * _LINE)] * len(rows), add)
    for m, total in enumerate(_loop(b, whole, k, 1, [folded(total) for total in sums], add_one)):
        b.store(total, b.gep(out, [_INT(m)]))


@intrinsic
def floats(typing: Any, address: Any) -> Any:
    """An address as a pointer to float32."""
    signature = types.CPointer(types.float32)(types.intp)
    return signature, lambda context, b, sig, args: b.inttoptr(args[0], _FLOAT.as_pointer())


@intrinsic
def integers(typing: Any, address: Any) -> Any:
    """An address as a pointer to int64."""
    signature = types.CPointer(types.intp)(types.intp)
    return signature, lambda context, b, sig, args: b.inttoptr(args[0], _INT.as_pointer())


@intrinsic
def claim(typing: Any, counter: Any, n: Any) -> Any:
    """Add n to a counter (its address) that all threads share; what it was before."""
    signature = types.intp(types.intp, types.intp)

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return b.atomic_rmw("add", b.inttoptr(args[0], _INT.as_pointer()), args[1], "monotonic")

    return signature, code


@intrinsic
def address_of(typing: Any, pointer: Any) -> Any:
    """The address of a pointer."""
    return types.intp(pointer), lambda context, b, sig, args: b.ptrtoint(args[0], _INT)


@intrinsic
def wait(typing: Any, barrier: Any) -> Any:
    """Call the function at this address."""

    def code(context: Any, b: Any, signature: Any, args: Any) -> Any:
        b.call(b.inttoptr(args[0], ir.FunctionType(ir.VoidType(), []).as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.intp), code


_1, _4, _8, _16, _32 = (_tile(lanes, TILE) for lanes in (1, 4, 8, 16, 32))
_1_one, _4_one, _8_one, _16_one, _32_one = (_tile(lanes, 1) for lanes in (1, 4, 8, 16, 32))


@njit(cache=True, nogil=True)
def lanes_for(n):  # pragma: no cover - compiled
    """The lanes that n rows take."""
    return 1 if n == 1 else 4 if n <= 4 else 8 if n <= 8 else 16 if n <= 16 else 32


@njit(cache=True, nogil=True)
def part(outputs, threads):  # pragma: no cover - compiled
    """Outputs that a thread claims at once: half of its share. Few parts: what is fetched beyond one is another's."""
    return max(outputs // (2 * threads) // TILE, 1) * TILE


@njit(cache=True, nogil=True)
def multiply(lanes, weight, x, k, out):  # pragma: no cover - compiled
    """out (TILE, lanes) = W (TILE, k) x (k, lanes), float32, given by address."""
    if lanes == 1:
        _1(weight, x, k, out)
    elif lanes == 4:
        _4(weight, x, k, out)
    elif lanes == 8:
        _8(weight, x, k, out)
    elif lanes == 16:
        _16(weight, x, k, out)
    else:
        _32(weight, x, k, out)


@njit(cache=True, nogil=True)
def multiply_one(lanes, weight, x, k, out):  # pragma: no cover - compiled
    """The same for a single output."""
    if lanes == 1:
        _1_one(weight, x, k, out)
    elif lanes == 4:
        _4_one(weight, x, k, out)
    elif lanes == 8:
        _8_one(weight, x, k, out)
    elif lanes == 16:
        _16_one(weight, x, k, out)
    else:
        _32_one(weight, x, k, out)

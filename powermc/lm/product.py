"""Few rows times a large matrix, x W^T in float32 on a CPU, near the time it takes to read the matrix.

A decode pass multiplies every weight with a handful of rows, and general products do not read weights at full speed
there: they rearrange them, or use a fraction of their vectors. Here the rows of x stand side by side in one vector, a
weight is broadcast to it, and the next weights are on their way from memory in the meantime.

The compiled loop runs on the threads that torch itself keeps (its OpenMP library is asked for them): a second pool
would fight with the first one's waiting threads for the same cores.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir
from numba import carray, cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic

_TILE = 8
"""Weights of so many outputs are read side by side, each into a register of its own."""
_LINE = 16
"""Floats in a cache line."""
_CHUNKS = 4
"""Parts of the work per thread: whoever is done takes the next one."""
_FLOAT, _INT, _INT32 = ir.FloatType(), ir.IntType(64), ir.IntType(32)


@cache
def most_rows() -> int:
    """How many rows the registers of this processor hold: 32, or 8 without AVX-512."""
    return 32 if binding.get_host_cpu_features().get("avx512f") else 8


@cache
def _parallel() -> Any:
    """`GOMP_parallel` of the OpenMP library that torch has loaded, or None: (function, data, threads, flags)."""
    own = sorted(Path(torch.__file__).parent.glob("lib/lib*omp*"))
    for name in (*map(str, own), "libgomp.so.1"):
        try:
            function = ctypes.CDLL(name).GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
        return function
    return None


def available() -> bool:
    """Whether `product` can use the threads that torch is told to use."""
    return torch.get_num_threads() == 1 or _parallel() is not None


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T, shape (n, N), of x (n, K) and W (N, K); float32, on the CPU, n up to `most_rows()`.

    Every sum is taken in the order of K, one fused multiply-add after the other: a row's result does not depend on how
    many rows there are, nor on the number of threads.
    """
    x, weight = x.contiguous(), weight.contiguous()
    (n, k), outputs, threads = x.shape, len(weight), torch.get_num_threads()
    result = x.new_empty(n, outputs)
    chunk = max(outputs // (threads * _CHUNKS) // _TILE, 1) * _TILE
    addresses = weight.data_ptr(), x.data_ptr(), result.data_ptr()
    job = (ctypes.c_int64 * 8)(0, *addresses, n, k, outputs, chunk)
    if threads == 1:
        _work.ctypes(job)
    else:
        _parallel()(_work.address, ctypes.addressof(job), threads, 0)
    return result


def _tile(lanes: int, outputs: int) -> Any:
    """A compiled function: out (outputs, lanes) = W (outputs, k) x (k, lanes), all given by address."""
    vector = ir.VectorType(_FLOAT, lanes)
    undefined, broadcast = ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(_INT32, lanes), [0] * lanes)

    @intrinsic
    def tile(typing: Any, weight: Any, x: Any, k: Any, out: Any) -> Any:
        def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
            k = args[2]
            weight, x, out = (b.inttoptr(args[i], _FLOAT.as_pointer()) for i in (0, 1, 3))
            byte = ir.IntType(8).as_pointer()
            fma = _function(b, f"llvm.fma.v{lanes}f32", vector, [vector] * 3)
            fetch = _function(b, "llvm.prefetch.p0", ir.VoidType(), [byte, _INT32, _INT32, _INT32])
            rows = [b.gep(weight, [b.mul(k, _INT(m))]) for m in range(outputs)]
            tall = vector.as_pointer()

            def loop(first: Any, stop: Any, sums: list[Any], width: int) -> list[Any]:
                """Add the products of positions first..stop-1, `width` of them at a time."""
                before, head, body, after = b.block, *(b.append_basic_block() for _ in range(3))
                b.branch(head)
                b.position_at_end(head)
                at, running = b.phi(_INT), [b.phi(vector) for _ in sums]
                for phi, value in zip((at, *running), (first, *sums), strict=True):
                    phi.add_incoming(value, before)
                b.cbranch(b.icmp_signed("<", at, stop), body, after)
                b.position_at_end(body)
                added = list(running)
                for row in rows if width == _LINE else ():  # the same positions of the next tile
                    ahead = b.bitcast(b.gep(row, [b.add(at, b.mul(k, _INT(outputs)))]), byte)
                    b.call(fetch, [ahead, _INT32(0), _INT32(3), _INT32(1)])
                for i in range(width):
                    place = b.add(at, _INT(i))
                    column = b.load(b.bitcast(b.gep(x, [b.mul(place, _INT(lanes))]), tall), align=4)
                    for m, row in enumerate(rows):
                        one = b.insert_element(undefined, b.load(b.gep(row, [place])), _INT32(0))
                        added[m] = b.call(fma, [b.shuffle_vector(one, undefined, broadcast), column, added[m]])
                for phi, value in zip((at, *running), (b.add(at, _INT(width)), *added), strict=True):
                    phi.add_incoming(value, b.block)
                b.branch(head)
                b.position_at_end(after)
                return running

            whole = b.sub(k, b.srem(k, _INT(_LINE)))
            sums = loop(_INT(0), whole, [ir.Constant(vector, [0.0] * lanes)] * outputs, _LINE)
            for m, total in enumerate(loop(whole, k, sums, 1)):
                b.store(total, b.bitcast(b.gep(out, [_INT(m * lanes)]), tall), align=4)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, types.intp, types.intp), build

    return tile


def _function(b: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    return cgutils.get_or_insert_function(b.module, ir.FunctionType(result, arguments), name)


@intrinsic
def _floats(typing: Any, address: Any) -> Any:
    """An address as a pointer to float32."""
    signature = types.CPointer(types.float32)(types.intp)
    return signature, lambda context, b, sig, args: b.inttoptr(args[0], _FLOAT.as_pointer())


@intrinsic
def _claim(typing: Any, counter: Any, n: Any) -> Any:
    """Add n to a counter that all threads share; what it was before."""
    signature = types.intp(counter, types.intp)
    return signature, lambda context, b, sig, args: b.atomic_rmw("add", args[0], args[1], "monotonic")


_four, _eight, _sixteen, _thirty_two = (_tile(lanes, _TILE) for lanes in (4, 8, 16, 32))
_four1, _eight1, _sixteen1, _thirty_two1 = (_tile(lanes, 1) for lanes in (4, 8, 16, 32))


@cfunc(types.void(types.CPointer(types.intp)), cache=True)
def _work(job: Any) -> None:  # pragma: no cover - compiled
    """What one thread does: outputs, a chunk at a time, until none is left."""
    n, k, outputs, chunk = job[4], job[5], job[6], job[7]
    lanes = 4 if n <= 4 else 8 if n <= 8 else 16 if n <= 16 else 32
    given, result = carray(_floats(job[2]), (n, k)), carray(_floats(job[3]), (n, outputs))
    columns = np.zeros((k, lanes), np.float32)
    for i in range(k):
        for row in range(n):
            columns[i, row] = given[row, i]
    sums = np.empty((_TILE, lanes), np.float32)
    x, out = columns.ctypes.data, sums.ctypes.data
    while True:
        first = _claim(job, chunk)
        if first >= outputs:
            return
        last = min(first + chunk, outputs)
        while first < last:
            weight = job[1] + first * k * 4
            whole = first + _TILE <= last
            if lanes == 4:
                if whole:
                    _four(weight, x, k, out)
                else:
                    _four1(weight, x, k, out)
            elif lanes == 8:
                if whole:
                    _eight(weight, x, k, out)
                else:
                    _eight1(weight, x, k, out)
            elif lanes == 16:
                if whole:
                    _sixteen(weight, x, k, out)
                else:
                    _sixteen1(weight, x, k, out)
            elif whole:
                _thirty_two(weight, x, k, out)
            else:
                _thirty_two1(weight, x, k, out)
            done = _TILE if whole else 1
            for row in range(n):
                for m in range(done):
                    result[row, first + m] = sums[m, row]
            first += done

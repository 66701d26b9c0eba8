"""Few rows times a large matrix, x W^T in float32 on a CPU, near the time it takes to read the matrix.

A decode pass multiplies every weight with a handful of rows, and general products do not read weights at full speed
there: they rearrange them, or use a fraction of their vectors. `powermc.lm.tiles` does neither. Its loops run on the
threads that torch itself keeps (its OpenMP library is asked for them): a second pool would fight with the first one's
waiting threads for the same cores.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import cfunc, types

from powermc.lm.tiles import TILE, address_of, carray, claim, floats, lanes_for, multiply, multiply_one, part


@cache
def _openmp() -> Any:
    """The OpenMP library that torch has loaded, if it can be asked as GNU's can; else None."""
    own = sorted(Path(torch.__file__).parent.glob("lib/lib*omp*"))
    for name in (*map(str, own), "libgomp.so.1"):
        try:
            library = ctypes.CDLL(name)
            library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            library.GOMP_parallel.restype = None
            library.GOMP_barrier  # noqa: B018  # the attribute is looked up in the library
        except (OSError, AttributeError):
            continue
        return library
    return None


def available() -> bool:
    """Whether compiled work can use the threads that torch is told to use."""
    return torch.get_num_threads() == 1 or _openmp() is not None


def together(work: Any, job: Any) -> None:
    """Run a compiled function, a cfunc of one pointer, on all of torch's threads at once, each with the same job."""
    threads = torch.get_num_threads()
    if threads == 1:
        work.ctypes(job)
    else:
        _openmp().GOMP_parallel(work.address, ctypes.addressof(job), threads, 0)


def barrier() -> int:
    """The address of a function in which the threads of `together` wait for each other; 0 for a single thread."""
    if torch.get_num_threads() == 1:
        return 0
    return ctypes.cast(_openmp().GOMP_barrier, ctypes.c_void_p).value or 0


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T, shape (n, N), of x (n, K) and W (N, K); float32, on the CPU, n up to `MOST_LANES`.

    From two rows on every sum is taken in the order of K, one fused multiply-add after the other: a row's result does
    not depend on how many rows there are, nor ever on the number of threads.
    """
    x, weight = x.contiguous(), weight.contiguous()
    (n, k), outputs = x.shape, len(weight)
    result = x.new_empty(n, outputs)
    chunk = part(outputs, torch.get_num_threads())
    together(_work, (ctypes.c_int64 * 8)(0, weight.data_ptr(), x.data_ptr(), result.data_ptr(), n, k, outputs, chunk))
    return result


@cfunc(types.void(types.CPointer(types.intp)), cache=True)
def _work(job: Any) -> None:  # pragma: no cover - compiled
    """What one thread does: outputs, a chunk at a time, until none is left."""
    n, k, outputs, chunk = job[4], job[5], job[6], job[7]
    lanes = lanes_for(n)
    given, result = carray(floats(job[2]), (n, k)), carray(floats(job[3]), (n, outputs))
    columns = np.zeros((k, lanes), np.float32)
    for i in range(k):
        for row in range(n):
            columns[i, row] = given[row, i]
    sums = np.empty((TILE, lanes), np.float32)
    x, out = columns.ctypes.data, sums.ctypes.data
    while True:
        first = claim(address_of(job), chunk)
        if first >= outputs:
            return
        last = min(first + chunk, outputs)
        while first < last:
            whole = first + TILE <= last
            if whole:
                multiply(lanes, job[1] + first * k * 4, x, k, out)
            else:
                multiply_one(lanes, job[1] + first * k * 4, x, k, out)
            done = TILE if whole else 1
            for row in range(n):
                for m in range(done):
                    result[row, first + m] = sums[m, row]
            first += done

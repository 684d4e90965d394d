"""Run kernels of a library built with sanitizers, which end the process where an access is out of bounds.

``python -m tests.support.shim.bounds LIBRARY``, with the sanitizer's library preloaded: says ``clean``, then reads
one row of the features too many, and never says ``unseen``.
"""

import sys

import numpy as np

from gpu_init.kernels import Csr, cuda
from tests.support import cuda_checks as checks
from tests.support.shim import Poisoned, Shim

NAMES = [name for names in cuda.instances().values() for name in names]


def exactly(p):
    """The problem without the interactions after the last user's."""
    count = int(p["csr"].indptr[-1])
    return {**p, "csr": Csr(*(array if array is None else array[:count].copy() for array in p["csr"]))}


def main():
    kernels = cuda.CudaKernels(Poisoned(), None, Shim(sys.argv[1], NAMES))
    where = checks.Where(kernels, lambda array: array, lambda array: array)
    for seed, width in enumerate([1, 3, 8, 33, 100, 130, 384, 516]):
        for features in checks.FEATURE_TYPES:
            degrees = checks.random_degrees(np.random.default_rng(seed), 5, longest=((), (64,), (65, 300))[seed % 3])
            p = exactly(checks.problem(seed, degrees, 7, width, 3, seed % 2 == 0, features, seed % 4 < 2))
            for by_item in (False, True):
                checks.check_blend(where, p, by_item, np.float16 if seed % 2 else np.float32)
            checks.check_aggregate(where, p)
            checks.check_squared_norms(where, p)
        checks.check_assign(where, p, width % 77 + 1)
        checks.check_assign(where, p, width % 9 + 1)
        checks.check_equal_scores(where, width)
        checks.check_label_sums(where, p, 3)
        checks.check_row_sums(where, p)
    checks.check_no_users(where)
    print("clean", flush=True)
    p = checks.problem(0, [5], 4, 16, 3, weighted=False)
    p["row_scale"][:] = p["item_scale"][:] = 1.0
    p["csr"].indices[:] = 3
    checks.blend(where, {**p, "features": p["features"][:3].copy()}, by_item=False)
    print("unseen")


if __name__ == "__main__":
    main()

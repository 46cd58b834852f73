"""Where PiSSA starts: the largest singular vectors of a weight. Meng et al. 2024,
https://arxiv.org/abs/2404.02948"""

import mlx.core as mx
import numpy as np

__all__ = ["largest"]


def largest(weight: mx.array, rank: int, scale: float) -> tuple[mx.array, mx.array]:
    """(A, B) with scale * B A the best approximation of `weight` of that rank, halved fairly between both.

    By subspace iteration (Halko et al. 2011, https://arxiv.org/abs/0909.4061) in numpy: a full decomposition
    takes minutes for a large matrix, and MLX has none on the GPU. Happens once, before training.
    """
    w = np.array(weight.astype(mx.float32))
    kept = min(rank, *w.shape)
    width = min(2 * kept + 8, *w.shape)
    basis = np.random.default_rng(0).standard_normal((w.shape[1], width)).astype(np.float32)
    for _ in range(6):
        basis = np.linalg.qr(w.T @ np.linalg.qr(w @ basis)[0])[0]
    u, sizes, v = np.linalg.svd(w @ basis, full_matrices=False)
    root = np.sqrt(sizes[:kept] / scale)
    a, b = root[:, None] * (v @ basis.T)[:kept], u[:, :kept] * root
    pad = rank - kept
    return mx.array(np.pad(a, ((0, pad), (0, 0)))), mx.array(np.pad(b, ((0, 0), (0, pad))))

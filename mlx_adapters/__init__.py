"""mlx-adapters: adapters for language models on Apple MLX, exchanged with PyTorch.

Importing the package does one thing beyond defining names: on Linux it loads a fast BLAS, because that
must happen before `mlx.core` is loaded (see `mlx_adapters.cpu.blas`).
"""

from mlx_adapters.cpu import blas

__version__ = "0.1.0"
__all__ = ["__version__"]

blas.load_fast_blas()

"""Import mlx_adapters before any test imports mlx: the fast BLAS must be loaded first."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see mlx_adapters.cli.app.main
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network

import mlx_adapters  # noqa: F401

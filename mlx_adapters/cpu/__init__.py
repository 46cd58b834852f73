"""What only the CPU backend needs: a fast BLAS, its threads, kernels, and processes that share a machine."""

"""Recurrent layers computed in chunks: what is serial token by token becomes matrix products of a chunk."""

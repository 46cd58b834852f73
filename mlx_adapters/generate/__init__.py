"""Answers of a model: decoding, sampling, beam search, and the likelihood of fixed answers."""

"""A study: a grid of adapters trained and measured on one model, as in the paper, and its report."""

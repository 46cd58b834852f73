"""Pfeiffer's adapter: a bottleneck after the MLP, reading the residual stream too. Pfeiffer et al. 2020, https://arxiv.org/abs/2005.00052"""

from mlx_adapters.methods import bottleneck


class SeqBN(bottleneck.BlockBottleneck):
    """Pfeiffer's adapter: a bottleneck after the MLP, reading the residual stream too. Pfeiffer et al. 2020,
    https://arxiv.org/abs/2005.00052

        y = h + s + f(h + s),    f(x) = scaling * (up(act(down(x) + bias)) + bias)

    It stands behind the MLP of a block. `h` is the residual stream before the sublayer's norm, `s` what the
    sublayer returns; the formula and its place are AdapterHub's (`adapters` 1.3), whose library opens the
    export.
    """

    NAME = "seq_bn"
    TITLE = "Pfeiffer's adapter: a bottleneck after the MLP, reading the residual stream too"
    AUTHORS = "Pfeiffer et al. 2020"
    PAPER = "https://arxiv.org/abs/2005.00052"
    KIND = "seq"

"""Houlsby's adapter: a bottleneck after attention and one after the MLP. Houlsby et al. 2019, https://arxiv.org/abs/1902.00751"""

from mlx_adapters.fields import field
from mlx_adapters.methods import bottleneck


class DoubleSeqBN(bottleneck.BlockBottleneck):
    """Houlsby's adapter: a bottleneck after attention and one after the MLP. Houlsby et al. 2019,
    https://arxiv.org/abs/1902.00751

        y = h + s + f(s),    f(x) = scaling * (up(act(down(x) + bias)) + bias)

    It stands behind both sublayers of a block. `h` is the residual stream before the sublayer's norm, `s`
    what the sublayer returns; the formula and its place are AdapterHub's (`adapters` 1.3), whose library
    opens the export.
    """

    NAME = "double_seq_bn"
    TITLE = "Houlsby's adapter: a bottleneck after attention and one after the MLP"
    AUTHORS = "Houlsby et al. 2019"
    PAPER = "https://arxiv.org/abs/1902.00751"
    KIND = "double"

    non_linearity: str = field("swish", bottleneck.ACTIVATION_HELP)

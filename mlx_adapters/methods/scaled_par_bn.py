"""The parallel adapter beside the MLP, with a learned scale. He et al. 2021, https://arxiv.org/abs/2110.04366"""

from mlx_adapters.fields import field
from mlx_adapters.methods import bottleneck


class ScaledParBN(bottleneck.BlockBottleneck):
    """The parallel adapter beside the MLP, with a learned scale. He et al. 2021,
    https://arxiv.org/abs/2110.04366

        y = h + s + f(h),    f(x) = scaling * (up(act(down(x) + bias)) + bias)

    It stands beside the MLP of a block. `h` is the residual stream before the sublayer's norm, `s` what the
    sublayer returns; the formula and its place are AdapterHub's (`adapters` 1.3), whose library opens the
    export.
    """

    NAME = "scaled_par_bn"
    TITLE = "The parallel adapter beside the MLP, with a learned scale"
    AUTHORS = "He et al. 2021"
    PAPER = "https://arxiv.org/abs/2110.04366"
    KIND = "par"

    reduction_factor: float = field(2.0, bottleneck.FACTOR_HELP)
    scaling: float | str = field("learned", bottleneck.SCALING_HELP)

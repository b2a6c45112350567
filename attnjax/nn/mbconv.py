"""MBConv: wide depthwise convolutions between narrow maps, weighed by channels.

Source: Sandler et al., "MobileNetV2", arXiv 1801.04381, section 3.3 (the inverted
bottleneck); Hu et al., "Squeeze-and-Excitation Networks", arXiv 1709.01507, section 3;
in the pre-norm form of Tu et al., "MaxViT", arXiv 2204.01697, section 3.3 and appendix.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from attnjax.nn.batch_norm import BatchNorm
from attnjax.nn.convolution import DepthwiseConvolution
from attnjax.nn.linear import Linear
from attnjax.nn.mlp import ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class MBConvConfig:
    """Where MBConvs stand in a model's layers, and their widths.

    Attributes:
        every: one in front of every so many layers of a stage, from its first (none:
            in front of none); MaxViT's 2 is one for a block and a lattice.
        expansion: channels of the depthwise convolution, as a multiple of C.
        squeeze: width of the squeeze and excitation, as a share of C, rounded down.
        norm_eps: epsilon of batch norms, the stem's too.
        norm_momentum: share of a batch in their new running statistics.
    """

    every: int | None = None
    expansion: int = 4
    squeeze: float = 0.25
    norm_eps: float = 1e-3
    norm_momentum: float = 0.01

    def __post_init__(self):
        for name, rule, is_good in (
            ("every", "at least 1, or none", lambda v: v is None or v >= 1),
            ("expansion", "at least 1", lambda v: v >= 1),
            ("squeeze", "in (0, 1]", lambda v: 0 < v <= 1),
            ("norm_eps", "positive", lambda v: v > 0),
            ("norm_momentum", "in (0, 1]", lambda v: 0 < v <= 1),
        ):
            value = getattr(self, name)
            if not is_good(value):
                raise ValueError(f"{name} must be {rule}; got {value}.")

    def widths(self, dim: int) -> tuple[int, int]:
        """(channels of the depthwise convolution, of the squeeze) for C = `dim`.

        Raises:
            ValueError: where nothing is left of the squeeze.
        """
        squeezed = int(self.squeeze * dim)
        if squeezed < 1:
            raise ValueError(
                "squeeze must leave at least one channel of each width; got squeeze="
                f"{self.squeeze}, a width of {dim}."
            )
        return self.expansion * dim, squeezed


class MBConv(nnx.Module):
    """Images [B, H, W, I] -> [B, H / stride, W / stride, C].

    The residual is batch norm, a map to E = expansion * C, batch norm, activation, the
    depthwise convolution of 3 x 3 (which has the stride), batch norm, activation, the
    weighing of channels, and a map to C; no norm follows. The shortcut is the mean of
    stride x stride places, then a map where I is not C.

    Squeeze and excitation: sigmoid(excite(silu(squeeze(m)))) is the weight of each of
    the E channels, m their mean over all places.

    Parameters: `norm_in`, `expand` [I, E], `norm_expanded`, `depthwise` [9, E],
    `norm_convolved`, `squeeze` [E, S], `excite` [S, E], `project` [E, C] and, where
    I is not C, `shortcut` [I, C]. Norms have scale and bias, `expand` and `depthwise`
    no bias.

    Args:
        in_dim: I.
        dim: C.
        config: widths and norms.
        stride: 1 or more; it divides the sides.
        activation: a key of `ACTIVATIONS`, whose gate it does not have.
        use_bias: whether squeeze, excite, project and shortcut have biases.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        *,
        config: MBConvConfig,
        stride: int = 1,
        activation: str = "gelu_tanh",
        use_bias: bool = True,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        wide, squeezed = config.widths(dim)
        stored = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        def linear(before: int, behind: int, *, has_bias: bool = use_bias) -> Linear:
            std = before**-0.5
            return Linear(before, behind, use_bias=has_bias, std=std, **stored)

        def norm(width: int) -> BatchNorm:
            told = dict(eps=config.norm_eps, momentum=config.norm_momentum)
            return BatchNorm(width, **told, **stored)

        self.stride = stride
        self.activation = ACTIVATIONS[activation][0]
        self.norm_in = norm(in_dim)
        self.expand = linear(in_dim, wide, has_bias=False)
        self.norm_expanded = norm(wide)
        self.depthwise = DepthwiseConvolution(
            wide, stride=stride, use_bias=False, **stored
        )
        self.norm_convolved = norm(wide)
        self.squeeze = linear(wide, squeezed)
        self.excite = linear(squeezed, wide)
        self.project = linear(wide, dim)
        self.shortcut = linear(in_dim, dim) if in_dim != dim else None

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Shortcut and residual together; see the class."""
        y = self.residual(x, train=train)
        return self.passed(x) + y.astype(x.dtype)

    def passed(self, x: jax.Array) -> jax.Array:
        """The shortcut, in the dtype of x."""
        if self.stride > 1:
            batch, rows, columns, dim = x.shape
            step = self.stride
            cells = x.reshape(batch, rows // step, step, columns // step, step, dim)
            wide = cells.astype(jnp.promote_types(x.dtype, jnp.float32))
            x = wide.mean(axis=(2, 4)).astype(x.dtype)
        return x if self.shortcut is None else self.shortcut(x).astype(x.dtype)

    def residual(self, x: jax.Array, *, train: bool) -> jax.Array:
        """What is added to the shortcut, in the compute dtype; in training the norms'
        buffers move on."""
        batch, rows, columns, _ = x.shape
        y = self.expand(self.norm_in(x, train=train))
        y = self.activation(self.norm_expanded(y, train=train))
        grid, wide = (rows, columns), y.shape[-1]
        y = self.depthwise(y.reshape(batch, rows * columns, wide), grid)
        y = self.activation(self.norm_convolved(y, train=train))
        y = y * self.weights(y)[:, None].astype(y.dtype)
        out = self.project(y)
        side = (-(-rows // self.stride), -(-columns // self.stride))
        return out.reshape(batch, *side, -1)

    def weights(self, y: jax.Array) -> jax.Array:
        """[B, T, E] -> the weight of each channel, [B, E] in (0, 1)."""
        mean = y.astype(jnp.promote_types(y.dtype, jnp.float32)).mean(axis=1)
        return jax.nn.sigmoid(self.excite(jax.nn.silu(self.squeeze(mean))))

    def flops(self, places: int) -> float:
        """Forward FLOPs (2 a multiply-add) of its maps on an image of so many input
        places."""
        fewer = places // self.stride**2
        one = places * self.expand.kernel.size
        one += fewer * (self.depthwise.conv_kernel.size + self.project.kernel.size)
        one += self.squeeze.kernel.size + self.excite.kernel.size
        if self.shortcut is not None:
            one += fewer * self.shortcut.kernel.size
        return 2.0 * one

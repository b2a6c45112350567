"""Parts that do not mix tokens: linear maps, norms, MLPs, positions, embeddings."""

from attnjax.nn.anchoring import anchor_of, anchored, turned
from attnjax.nn.batch_norm import BatchNorm, batch_norm, batch_statistics
from attnjax.nn.conditioning import (
    Modulation,
    TimeEmbedding,
    shifted,
    time_features,
)
from attnjax.nn.convolution import Convolution, DepthwiseConvolution, depthwise
from attnjax.nn.dropout import drop_path, dropout
from attnjax.nn.embedding import Embedding
from attnjax.nn.grid_positions import (
    AxialRope,
    resample_table,
    rope_on_grid,
    sincos_2d,
    sincos_at,
)
from attnjax.nn.linear import Linear, axes_apart
from attnjax.nn.mbconv import MBConv, MBConvConfig
from attnjax.nn.mlp import ACTIVATIONS, MLP, mlp_parameters_per_unit
from attnjax.nn.norms import NORMS, LayerNorm, RMSNorm, make_norm
from attnjax.nn.parameter import Buffer, buffer, materialize, param
from attnjax.nn.patches import PatchEmbedding, patchify, unpatchify
from attnjax.nn.pooling import AttentivePool
from attnjax.nn.positions import (
    Rope,
    alibi_slopes,
    apply_rope,
    rope_frequencies,
)

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "NORMS",
    "AttentivePool",
    "AxialRope",
    "BatchNorm",
    "Buffer",
    "Convolution",
    "DepthwiseConvolution",
    "Embedding",
    "LayerNorm",
    "Linear",
    "MBConv",
    "MBConvConfig",
    "Modulation",
    "PatchEmbedding",
    "RMSNorm",
    "Rope",
    "TimeEmbedding",
    "alibi_slopes",
    "anchor_of",
    "anchored",
    "apply_rope",
    "axes_apart",
    "batch_norm",
    "batch_statistics",
    "buffer",
    "depthwise",
    "drop_path",
    "dropout",
    "make_norm",
    "materialize",
    "mlp_parameters_per_unit",
    "param",
    "patchify",
    "resample_table",
    "rope_frequencies",
    "rope_on_grid",
    "shifted",
    "sincos_2d",
    "sincos_at",
    "time_features",
    "turned",
    "unpatchify",
]

"""The training step that is measured: sizes, optimizer, and its parameters in the one
form that every program of the comparison can read."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Recipe:
    """nanoGPT's CPU recipe for Shakespeare's characters.

    Attributes:
        num_layers, num_heads, embed_dim: the model; its MLP is 4 embed_dim wide.
        seq_len, batch_size, vocab_size: tokens a sequence, sequences a step, V.
        norm_eps: epsilon of the layer norms.
        learning_rate, warmup_steps, steps, final_fraction: linear warm-up, then a
            cosine to final_fraction of the peak at `steps`.
        beta1, beta2, eps, weight_decay: AdamW; matrices and tables decay.
        clip_norm: global gradient norm above which gradients are scaled.
    """

    num_layers: int = 4
    num_heads: int = 4
    embed_dim: int = 128
    seq_len: int = 64
    batch_size: int = 12
    vocab_size: int = 65
    norm_eps: float = 1e-5
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    steps: int = 2000
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.batch_size * self.seq_len


def config(recipe: Recipe) -> dict[str, Any]:
    """The recipe as groups of a config, not yet resolved."""
    return {
        "model": {
            "layers": "attention",
            "num_layers": recipe.num_layers,
            "embed_dim": recipe.embed_dim,
            "num_heads": recipe.num_heads,
            "max_len": recipe.seq_len,
            "norm": "layer",
            "norm_eps": recipe.norm_eps,
            "positions": "learned",
            "activation": "gelu",
            "use_bias": False,
            "tie_embeddings": True,
        },
        "data": {
            "name": "tfds:tiny_shakespeare",
            "eval_split": "validation+test",
            "tokenizer": "chars",
            "seq_len": recipe.seq_len,
            "packing": "windows",
        },
        "optim": {
            "name": "adamw",
            "learning_rate": recipe.learning_rate,
            "schedule": "cosine",
            "warmup_steps": recipe.warmup_steps,
            "final_fraction": recipe.final_fraction,
            "beta1": recipe.beta1,
            "beta2": recipe.beta2,
            "eps": recipe.eps,
            "weight_decay": recipe.weight_decay,
            "clip_norm": recipe.clip_norm,
        },
        "train": {"steps": recipe.steps, "batch_size": recipe.batch_size},
    }


def tokens(recipe: Recipe, *, seed: int = 0) -> np.ndarray:
    """Random token ids, int32 [B, T + 1]: inputs and, one later, targets."""
    shape = (recipe.batch_size, recipe.seq_len + 1)
    drawn = np.random.default_rng(seed).integers(recipe.vocab_size, size=shape)
    return drawn.astype(np.int32)


def weights(params: dict) -> dict[str, Any]:
    """A framework model's parameters under the names of the comparison.

    Returns:
        numpy copies: "tokens" [V, C], "positions" [T, C], "final_norm" [C], and
        "layers" with a leading layer axis: "norm_mixer" and "norm_mlp" [L, C],
        "query", "key", "value" and "out" [L, C, C], "up" [L, C, M], "down" [L, M, C].
    """
    layers = params["layers"]["group_0"]["sub_0"]
    mixer, mlp = layers["mixer"], layers["mlp"]
    stacked = {
        "norm_mixer": layers["norm_mixer"]["scale"],
        "norm_mlp": layers["norm_mlp"]["scale"],
        **{name: mixer[name]["kernel"] for name in ("query", "key", "value", "out")},
        "up": mlp["up"]["kernel"],
        "down": mlp["down"]["kernel"],
    }
    return {
        "tokens": np.array(params["token_embedding"]["table"]),
        "positions": np.array(params["position_embedding"]["table"]),
        "final_norm": np.array(params["final_norm"]["scale"]),
        "layers": {name: np.array(array) for name, array in stacked.items()},
    }

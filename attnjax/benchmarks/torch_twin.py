"""The measured training step in eager PyTorch: same model, optimizer and data.

Written as PyTorch runs it fastest eagerly on a CPU: fused query-key-value product,
`scaled_dot_product_attention`, fused AdamW, gradients set to None. PyTorch is
optional (the extra `parity`); `missing()` says why the twin cannot run.
"""

import math
from typing import Any

import numpy as np

from attnjax.benchmarks.recipe import Recipe

try:
    import torch
    import torch.nn.functional as F
except ImportError as error:
    torch = None
    REASON = f"PyTorch is not installed ({error}); install the extra `parity`"


def missing() -> str | None:
    """Why the twin cannot run here, or None."""
    return REASON if torch is None else None


class Twin:
    """Parameters, optimizer and step.

    Args:
        recipe: sizes and optimizer.
        weights: first values, as from `recipe.weights`.
        threads: intra-op threads; PyTorch's setting is global.
    """

    def __init__(self, recipe: Recipe, weights: dict[str, Any], *, threads: int):
        torch.set_num_threads(threads)
        self.recipe = recipe
        self.params = _parameters(weights)
        self.count = 0
        matrices = [p for p in self.params.values() if p.dim() > 1]
        vectors = [p for p in self.params.values() if p.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": recipe.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.eps,
            fused=True,
        )

    def loss(self, ids: np.ndarray):
        """Mean nats a token of ids [B, T + 1]."""
        p, width = self.params, self.recipe.embed_dim
        ids = torch.from_numpy(ids).long()
        places = torch.arange(self.recipe.seq_len)
        x = F.embedding(ids[:, :-1], p["tokens"]) + F.embedding(places, p["positions"])
        for layer in range(self.recipe.num_layers):
            x = self._block(x, layer)
        x = F.layer_norm(x, (width,), p["final_norm"], None, self.recipe.norm_eps)
        logits = F.linear(x, p["tokens"])
        targets = ids[:, 1:].reshape(-1)
        return F.cross_entropy(logits.view(-1, self.recipe.vocab_size), targets)

    def _block(self, x, layer: int):
        p, recipe = self.params, self.recipe
        batch, length, width = x.shape
        scale = p[f"{layer}/norm_mixer"]
        normed = F.layer_norm(x, (width,), scale, None, recipe.norm_eps)
        qkv = F.linear(normed, p[f"{layer}/qkv"]).split(width, dim=2)
        heads = (batch, length, recipe.num_heads, width // recipe.num_heads)
        q, k, v = (part.view(heads).transpose(1, 2) for part in qkv)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed = mixed.transpose(1, 2).contiguous().view(batch, length, width)
        x = x + F.linear(mixed, p[f"{layer}/out"])
        scale = p[f"{layer}/norm_mlp"]
        normed = F.layer_norm(x, (width,), scale, None, recipe.norm_eps)
        hidden = F.gelu(F.linear(normed, p[f"{layer}/up"]))
        return x + F.linear(hidden, p[f"{layer}/down"])

    def step(self, ids: np.ndarray):
        """One update on ids [B, T + 1]; returns the loss before it, a tensor."""
        rate = learning_rate(self.recipe, self.count)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        value = self.loss(ids)
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.params.values(), self.recipe.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.count += 1
        return value.detach()


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * step / recipe.warmup_steps
    length = max(recipe.steps - recipe.warmup_steps, 1)
    share = (step - recipe.warmup_steps) / length
    floor = recipe.learning_rate * recipe.final_fraction
    wave = 1 + math.cos(math.pi * min(max(share, 0.0), 1.0))
    return floor + 0.5 * (recipe.learning_rate - floor) * wave


def _parameters(weights: dict[str, Any]) -> dict[str, Any]:
    """One tensor a layer and name; PyTorch stores the transpose, [out, in]."""
    arrays = {name: weights[name] for name in ("tokens", "positions", "final_norm")}
    layers = weights["layers"]
    for index in range(len(layers["out"])):
        own = {name: array[index] for name, array in layers.items()}
        joint = np.concatenate([own[n] for n in ("query", "key", "value")], axis=1)
        arrays |= {
            f"{index}/norm_mixer": own["norm_mixer"],
            f"{index}/norm_mlp": own["norm_mlp"],
            f"{index}/qkv": joint.T,
            f"{index}/out": own["out"].T,
            f"{index}/up": own["up"].T,
            f"{index}/down": own["down"].T,
        }
    return {
        name: torch.from_numpy(np.array(array, order="C")).requires_grad_()
        for name, array in arrays.items()
    }

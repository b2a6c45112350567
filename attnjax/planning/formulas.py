"""What a setting of mesh, remat and micro-batches costs, by formula.

Only `search` uses it, to choose what to compile. The factors were read off compiled
steps: which arrays are gathered and summed and how often, what is alive at the peak.
"""

import copy
import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from attnjax.planning import problem, targets
from attnjax.planning.targets import PlanTarget


class Remat(NamedTuple):
    """Work that is repeated and activations that are kept, as shares of a layer's."""

    repeated: float
    kept: float


REMAT = {"none": Remat(0.0, 1.45), "dots": Remat(0.1, 0.4), "full": Remat(1 / 3, 0.05)}
# Where no peaks are known (CPU) only what is more and what is less matters.
_HOP = 1e-6  # Seconds of a message to the next device of a ring: assumed.
_NO_CHIP = {"flops": 1e12, "bandwidth": 1e11, "link": 1e10, "network": 1e10}


@dataclasses.dataclass(frozen=True)
class Split:
    """How a step is divided.

    Attributes:
        data, fsdp, tensor: sizes of the mesh axes.
        remat: config.model.remat.
        accumulate: config.train.accumulate.
        sequence: devices that share the tokens of a row.
    """

    data: int
    fsdp: int
    tensor: int
    remat: str
    accumulate: int
    sequence: int = 1

    @property
    def shards(self) -> int:
        """Parts of the parameters."""
        return self.fsdp * self.tensor


@dataclasses.dataclass(frozen=True)
class Facts:
    """Numbers for the formulas.

    Attributes:
        params: of the model; `head` of them are a table or head [V, C], of which
            there are `tables`.
        flops: of one sequence, forward.
        loss_tokens: whose logits a device holds at a time.
        state_bytes: of parameters and optimizer.
        item: bytes of an activation.
        rates: peak and bandwidths, as in Chip.
        node: devices that share `link`, or None.
    """

    params: int
    head: int
    tables: int
    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    vocab: int
    batch: int
    seq_len: int
    flops: float
    loss_tokens: int
    state_bytes: int
    item: int
    rates: dict[str, float]
    node: int | None

    @classmethod
    def of(cls, config: dict, target: PlanTarget) -> "Facts":
        """Of a resolved config on a target."""
        single = copy.deepcopy(config)
        single["mesh"].update(data=1, fsdp=1, tensor=1, sequence=1)
        here = problem.experiment(single, target, targets.devices(target)[:1])
        from attnjax.training import start

        dims, chip = here.model.dims, target.chip
        found = here.feed.search_facts(here.model)
        return cls(
            params=here.model.parameter_count(),
            head=found["vocab"] * dims.embed_dim,
            layers=dims.num_layers,
            width=dims.embed_dim,
            mlp=here.model.block_dims.mlp_dim,
            heads=dims.num_heads,
            kv_heads=dims.num_kv_heads,
            batch=config["train"]["batch_size"],
            flops=here.row_flops,
            **found,
            state_bytes=problem.device_bytes(start.abstract_state(here)),
            item=4 if dims.dtype == "float32" else 2,
            rates={name: getattr(chip, name).value for name in _NO_CHIP}
            if chip
            else _NO_CHIP,
            node=chip.node if chip else None,
        )

    def _tokens(self, split: Split) -> int:
        """Tokens of one micro-batch on one device."""
        rows = self.batch // (split.data * split.fsdp * split.accumulate)
        return rows * self.seq_len // split.sequence

    def _layer(self, split: Split) -> float:
        """Bytes of the activations inside of one layer."""
        widths = 12 * self.width + 4 * self.mlp / split.tensor
        return self._tokens(split) * widths * self.item

    def memory(self, split: Split) -> float:
        """Bytes a device: state, what layers keep, the larger of loss and one layer."""
        tokens, layer = self._tokens(split), self._layer(split)
        kept = self.layers * tokens * self.width * self.item
        kept += self.layers * REMAT[split.remat].kept * layer
        gradients = 4 * self.params / split.shards
        state = self.state_bytes / split.shards
        state += gradients if split.accumulate > 1 else 0
        # The logits and their gradient, and the head, gathered.
        logits = min(tokens, self.loss_tokens) * self.vocab / split.tensor
        loss = logits * (4 + self.item) + self.item * self.head / split.tensor
        return state + kept + max(loss, 2 * layer + gradients)

    def seconds(self, split: Split) -> float:
        """The slowest of products, memory and network; the others count a little."""
        rates, times, tokens = self.rates, split.accumulate, self._tokens(split)
        work = 1 + REMAT[split.remat].repeated
        devices = split.data * split.shards * split.sequence
        products = 3 * self.flops * self.batch * work / devices
        moved = times * 14 * work * self.layers * self._layer(split)
        moved += times * 45 * tokens * self.vocab / split.tensor
        moved += times * 6 * self.params / split.tensor
        moved += 2 * self.state_bytes / split.shards
        bounds = (
            products / rates["flops"],
            moved / rates["bandwidth"],
            times * sum(self._messages(split)),
        )
        return max(bounds) + 0.1 * sum(bounds)

    def _messages(self, split: Split) -> Iterator[float]:
        """Seconds on the network for one micro-batch, as the compiler lays it out."""
        layers = self.params - self.tables * self.head
        # Weights of a layer are gathered forward and backward, those of the head once;
        # gradients are summed in the dtype of the products, but a table's in float32.
        weights = self.item * (layers + self.head) / split.tensor
        gathered = weights + self.item * layers / split.tensor
        if split.fsdp > 1:
            calls = 3 * self.layers
            stride = split.tensor * split.sequence
            yield self._ring(gathered + weights, split.fsdp, stride, calls)
        if split.data > 1:
            summed = weights + (0 if split.fsdp > 1 else 4 * self.head / split.tensor)
            inside = split.fsdp * split.tensor * split.sequence
            yield self._ring(2 * summed / split.fsdp, split.data, inside, 2)
        stream = self.layers * self._tokens(split) * self.width * self.item
        if split.tensor > 1:
            stride = split.sequence
            yield self._ring(16 * stream, split.tensor, stride, 6 * self.layers)
        if split.sequence > 1:
            # Queries, keys, values and outputs, forward, again, and back.
            share = 1 + self.kv_heads / self.heads
            sent = 6 * share * stream / split.tensor
            yield self._ring(sent, split.sequence, 1, 12 * self.layers)
            # Gradients of the weights, which these devices hold alike.
            yield self._ring(2 * weights / split.fsdp, split.sequence, 1, 2)

    def _ring(self, sent: float, group: int, stride: int, calls: int) -> float:
        """Seconds to pass `sent` bytes round a group of every `stride`-th device."""
        hops = calls * (group - 1) * _HOP
        times = [sent * (group - 1) / group / self.rates["link"]]
        if self.node is not None and group * stride > self.node:
            inside = max(1, self.node // stride)
            nodes = group / inside
            share = sent * (nodes - 1) / nodes / inside
            times.append(share / self.rates["network"])
        return max(times) + hops

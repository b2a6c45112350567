"""`config.train` and `config.eval`, the same for whatever is learned."""

import dataclasses
from typing import Literal

from attnjax.core import schema


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """`config.train`.

    Attributes:
        steps: optimizer steps.
        batch_size: sequences or images a step, over all devices and micro-batches.
        seed: of initial values, data order and dropout.
        accumulate: micro-batches a step.
        steps_per_dispatch: steps in one compiled call; results do not depend on it.
        log_every: steps between lines of metrics.
        save_every: steps between checkpoints (none: only at the end and on signals).
        save_minutes: also save when this many minutes have passed since the last
            checkpoint (none: never).
        keep_last: newest checkpoints kept.
        keep_best: checkpoints with the best held-out loss kept beside them.
        on_bad_step: when an update is not finite it is never applied; "stop" ends
            the run after `patience` in a row, "skip" counts and goes on.
        patience: how many bad steps in a row "stop" waits for.
        init_from: a run directory whose parameters are the first ones (none: random).
        init_layers: which layer of that run each layer starts from (none: the same
            numbers).
        init_convert: a mechanism whose layers are made from that run's, which may be
            of another kind or size: moh, dha, grouped_differential_attention (none:
            arrays of equal names and shapes).
        init_options: settings of a conversion that searches, by its name, such as
            dha.budget.
        tensorboard: write TensorBoard events.
        tracker: "none" or "wandb".
        profile_start: first profiled step (none: no profile).
        profile_steps: number of profiled steps.
        sample_tokens: tokens of the sample written at the end (0: none).
    """

    steps: int = 1000
    batch_size: int = 32
    seed: int = 0
    accumulate: int = 1
    steps_per_dispatch: int = 1
    log_every: int = 50
    save_every: int | None = 500
    save_minutes: float | None = None
    keep_last: int = 2
    keep_best: int = 1
    on_bad_step: Literal["stop", "skip"] = "stop"
    patience: int = 3
    init_from: str | None = None
    init_layers: tuple[int, ...] | None = None
    init_convert: str | None = None
    init_options: schema.Deferred = dataclasses.field(default_factory=dict)
    tensorboard: bool = True
    tracker: Literal["none", "wandb"] = "none"
    profile_start: int | None = None
    profile_steps: int = 5
    sample_tokens: int = 200


@dataclasses.dataclass(frozen=True)
class DrawConfig:
    """How images are drawn from a denoiser.

    Attributes:
        per_class: images of each class in the picture, one class a column (0: no
            picture).
        classes: the first so many classes.
        sampler: a name of `tasks.denoising.sampling.SAMPLERS` (none: ddim for Gaussian
            processes, heun for flows).
        steps: passes of the sampler.
        guidance: scale of classifier-free guidance (1: none).
        seed: of the noise.
    """

    per_class: int = 8
    classes: int = 10
    sampler: str | None = None
    steps: int = 50
    guidance: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name, least in (("per_class", 0), ("classes", 1), ("steps", 1)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}.")
        if self.guidance < 0:
            raise ValueError(f"guidance must not be negative; got {self.guidance}.")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """`config.eval`.

    Attributes:
        every: steps between evaluations (none: only at the end).
        batches: batches an evaluation reads (none: the whole held-out split).
        batch_size: sequences or images a batch (none: train.batch_size).
        use_ema: evaluate the averaged parameters where there are any.
        explain: held-out rows on which each evaluation lays attention open, for the
            metrics first_token_attention, sink_rate, mean_gate, max_activation, ...
            (`tasks/sink_metrics.py`); 0: none. The papers take 100.
        explain_len: tokens of those rows, at most config.data.seq_len.
    """

    every: int | None = 500
    batches: int | None = None
    batch_size: int | None = None
    use_ema: bool = True
    explain: int = 0
    explain_len: int = 64

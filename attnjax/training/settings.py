"""`config.train` and `config.eval`, the same for whatever is learned."""

import dataclasses
from typing import Any, Literal

from attnjax.core import schema
from attnjax.core.errors import nearest
from attnjax.tasks.denoising import perturbing, sampling


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


PERTURB_OPTIONS = (
    "perturb",
    "perturb_strength",
    "perturb_heads",
    "perturb_interval",
    "perturb_decay",
)


@dataclasses.dataclass(frozen=True)
class DrawConfig:
    """How images are drawn from a denoiser.

    Attributes:
        per_class: images of each class in the picture, one class a column (0: no
            picture).
        classes: the first so many classes.
        sampler: a name of `tasks.denoising.sampling.SAMPLERS` (none: ddim for Gaussian
            processes, heun for flows).
        sampler_options: of the sampler, as "diffusion=linear,last_step=tweedie": the
            other fields of `tasks.denoising.sampling.Settings`.
        steps: passes of the sampler; of dopri5, tried at most.
        guidance: scale of classifier-free guidance (1: none).
        rescale: share in [0, 1] of a guided prediction that is brought back to the
            spread of the unguided one.
        perturb_scale: w of guidance by a pass with perturbed attention,
            w (f_c - f_pert) added to the prediction (0: none).
        perturb: what the weights of its heads are moved to: "identity" (every token
            sees itself), "uniform" (all alike), "largest" (the one it sees most),
            "mean_query" (what the mean query sees); with text in the row, of patches
            "image_identity" (sees the text and itself) and "image_gathered" (what it
            gives to patches goes to itself); to the identity along a curve: "slerp",
            "nlerp", "log_linear"; or "temperature".
        perturb_strength: how far, u in (0, 1]; the temperature, which 1 changes not.
        perturb_heads: which heads: "all", or layers with their heads from 0, as
            "2:0,1;3:all".
        perturb_interval: noise levels, from 0 (clean) to 1, in which it acts.
        perturb_decay: what w loses on the way from noise to data, where it reaches
            max(0, w - perturb_decay).
        seed: of the noise.
    """

    per_class: int = 8
    classes: int = 10
    sampler: str | None = None
    sampler_options: str = ""
    steps: int = 50
    guidance: float = 1.0
    rescale: float = 0.0
    perturb_scale: float = 0.0
    perturb: perturbing.Target = "identity"
    perturb_strength: float = 1.0
    perturb_heads: str = "all"
    perturb_interval: tuple[float, float] = (0.0, 1.0)
    perturb_decay: float = 0.0
    seed: int = 0

    def __post_init__(self):
        for name, least in (("per_class", 0), ("classes", 1), ("steps", 1)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}.")
        if self.guidance < 0:
            raise ValueError(f"guidance must not be negative; got {self.guidance}.")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale must be in [0, 1]; got {self.rescale}.")
        if self.rescale and self.guidance == 1 and not self.perturb_scale:
            raise ValueError(
                "rescale does nothing without guidance; got "
                f"rescale={self.rescale:g}, guidance=1. Set guidance, e.g. to 2."
            )
        sampling.parse_options(self.sampler_options)
        self._check_perturbation()

    def sampler_settings(self, process: Any) -> sampling.Settings:
        """How a noising process is sampled, checked against it.

        Raises:
            UserError: for a sampler, or options, that it does not have.
        """
        made = sampling.Settings(
            sampler=self.sampler or sampling.default_sampler(process),
            num_steps=self.steps,
            **sampling.parse_options(self.sampler_options),
        )
        made.check(process)
        return made

    def _check_perturbation(self):
        object.__setattr__(self, "perturb_interval", tuple(self.perturb_interval))
        if not self.perturb_scale >= 0:
            raise ValueError(
                f"perturb_scale must not be negative; got {self.perturb_scale}."
            )
        for name in PERTURB_OPTIONS:
            value, plain = getattr(self, name), getattr(type(self), name)
            if not self.perturb_scale and value != plain:
                raise ValueError(
                    f"{name} does nothing without perturb_scale; got {name}={value}, "
                    "perturb_scale=0. Set perturb_scale, e.g. to 3."
                )
        if self.perturb not in perturbing.TARGETS:
            raise ValueError(
                f"perturb: unknown target {self.perturb!r}. "
                + nearest(self.perturb, perturbing.TARGETS)
            )
        if self.perturb_scale:
            perturbing.check_strength(self.perturb, self.perturb_strength)
        if not self.perturb_decay >= 0:
            raise ValueError(
                f"perturb_decay must not be negative; got {self.perturb_decay}."
            )
        low, high = self.perturb_interval
        if not 0 <= low < high <= 1:
            raise ValueError(
                "perturb_interval must be two rising noise levels in [0, 1]; got "
                f"{self.perturb_interval}."
            )
        perturbing.parse(self.perturb_heads)


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

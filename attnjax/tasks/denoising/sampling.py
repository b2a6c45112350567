"""How samples are drawn from a noising process: the options and what they refuse."""

import dataclasses

from attnjax.core.errors import UserError, unknown
from attnjax.tasks.denoising import Flow, Gaussian

SAMPLERS = {Gaussian: ("ddpm", "ddim"), Flow: ("euler", "heun", "sde")}
DIFFUSIONS = (
    "constant",
    "sigma",
    "linear",
    "sbdm",
    "decreasing",
    "increasing_decreasing",
)
LAST_STEPS = ("mean", "euler", "tweedie")
# The options that not every sampler has, and those that have it.
OWNERS = {
    "clip": ("ddpm", "ddim"),
    "eta": ("ddim",),
    "diffusion": ("sde",),
    "last_step": ("sde",),
    "last_step_size": ("sde",),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """A sampler and its options; None is the default. Static and hashable.

    Attributes:
        sampler: of a Gaussian process "ddpm" or "ddim"; of a flow "euler" or "heun"
            (the ODE), or "sde".
        num_steps: steps. Each evaluates the network once, of heun twice. ddpm, ddim: of
            the chain, 2 to `process.steps`. sde: the last one has no noise; >= 2.
        clip: ddpm, ddim: estimates of the data are limited to [-clip, clip] (off).
        eta: ddim: share of ddpm's noise in [0, 1]; 0 (default) is deterministic.
        diffusion: sde: w(t), half the squared size of the noise: "constant" 1, "sigma"
            sigma_t (default), "linear" 1 - t, "sbdm" g of `Scales.pull`, "decreasing"
            (cos(pi t) + 1)^2 / 4, "increasing_decreasing" sin(pi t)^2.
        last_step: sde: how the last step reaches the data: "mean" (default) by the
            SDE's drift without noise, "euler" by the velocity, "tweedie" by the
            estimate x/alpha + sigma^2/alpha score.
        last_step_size: sde: time left to the last step, in (0, 1); 0.04 by default.
    """

    sampler: str
    num_steps: int
    clip: float | None = None
    eta: float | None = None
    diffusion: str | None = None
    last_step: str | None = None
    last_step_size: float | None = None

    def __post_init__(self):
        self._check_owners()
        least = 1 if self.sampler in ("euler", "heun") else 2
        if self.num_steps < least:
            raise UserError(
                f"sampler {self.sampler}: num_steps must be at least {least}; "
                f"got num_steps={self.num_steps}. Take more."
            )
        if self.clip is not None and not self.clip > 0:
            raise UserError(
                f"sampler {self.sampler}: clip must be positive; got clip={self.clip}. "
                "Leave it out to limit nothing."
            )
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise UserError(
                f"sampler ddim: eta must be in [0, 1]; got eta={self.eta}. "
                "0 is deterministic, 1 has the noise of ddpm."
            )
        if self.diffusion is not None and self.diffusion not in DIFFUSIONS:
            raise unknown("sampler sde", "diffusion", self.diffusion, DIFFUSIONS)
        if self.last_step is not None and self.last_step not in LAST_STEPS:
            raise unknown("sampler sde", "last_step", self.last_step, LAST_STEPS)
        if self.last_step_size is not None and not 0 < self.last_step_size < 1:
            raise UserError(
                "sampler sde: last_step_size must be in (0, 1); "
                f"got last_step_size={self.last_step_size}. The default is 0.04."
            )

    def _check_owners(self):
        known = sorted(sum(SAMPLERS.values(), ()))
        if self.sampler not in known:
            raise unknown("sample", "sampler", self.sampler, known)
        for name, owners in OWNERS.items():
            value = getattr(self, name)
            if value is not None and self.sampler not in owners:
                raise UserError(
                    f"sampler {self.sampler}: {name} is an option of "
                    f"{' and '.join(owners)}; got {name}={value}. Leave it out."
                )

    def check(self, process: Gaussian | Flow) -> None:
        """Refuse what a process cannot do.

        Raises:
            UserError: for a sampler of the other process, more steps than the chain
                has, or a diffusion that is infinite where the sampler starts.
        """
        known = SAMPLERS[type(process)]
        kind = type(process).__name__.lower()
        if self.sampler not in known:
            raise UserError(
                f"sample: sampler must be one of {', '.join(known)} for a process of "
                f"kind {kind}; got sampler={self.sampler}. Take one of those."
            )
        if isinstance(process, Gaussian):
            if self.num_steps > process.steps:
                raise UserError(
                    f"sampler {self.sampler}: num_steps must not exceed the steps of "
                    f"the process; got num_steps={self.num_steps}, "
                    f"steps={process.steps}. Take fewer."
                )
        elif self.sampler == "sde":
            self._check_sde(process)

    def _check_sde(self, flow: Flow) -> None:
        first, last = self.sde_interval(flow)
        if not first < last:
            raise UserError(
                "sampler sde: last_step_size must leave time to the steps before it; "
                f"got last_step_size={self.last_step_size}, which starts at {last}, "
                f"with sampling_cut={first}. Take a smaller one."
            )
        if self.diffusion == "sbdm" and flow.path != "vp" and first == 0:
            raise UserError(
                "sampler sde: diffusion=sbdm is infinite at t = 0 on this path; got "
                f"path={flow.path}, a start at t = 0. Give the process a sampling_cut, "
                "as 1e-3, or take another diffusion."
            )

    def sde_interval(self, flow: Flow) -> tuple[float, float]:
        """First time of the SDE, and that from which its last step goes to the end."""
        size = 0.04 if self.last_step_size is None else self.last_step_size
        return flow.interval(sampling=True)[0], 1.0 - size


def default_sampler(process: Gaussian | Flow) -> str:
    """The sampler of a process where none is named: without noise on the way."""
    return "ddim" if isinstance(process, Gaussian) else "heun"

"""How samples are drawn from a noising process: the options and what they refuse."""

import dataclasses

from attnjax.core.errors import UserError, nearest, unknown
from attnjax.tasks.denoising import Flow, Gaussian

SAMPLERS = {
    Gaussian: ("ddpm", "ddim"),
    Flow: ("euler", "heun", "dopri5", "sde", "sde_heun"),
}
SDES = ("sde", "sde_heun")
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
    "diffusion": SDES,
    "last_step": SDES,
    "last_step_size": SDES,
    "atol": ("dopri5",),
    "rtol": ("dopri5",),
}


# Those whose values are names.
NAMED = ("diffusion", "last_step")


@dataclasses.dataclass(frozen=True)
class Settings:
    """A sampler and its options; None is the default. Static and hashable.

    Attributes:
        sampler: of a Gaussian process "ddpm" or "ddim"; of a flow "euler", "heun" or
            "dopri5" (the ODE), or "sde" or "sde_heun".
        num_steps: steps. Each evaluates the network once, of heun and sde_heun twice.
            ddpm, ddim: of the chain, 2 to `process.steps`. sde, sde_heun: the last one
            has no noise and evaluates once; >= 2. dopri5: tried at most, with 6
            evaluations each; samples are NaN where they do not suffice.
        clip: ddpm, ddim: estimates of the data are limited to [-clip, clip] (off).
        eta: ddim: share of ddpm's noise in [0, 1]; 0 (default) is deterministic.
        diffusion: sde, sde_heun: w(t), half the squared size of the noise: "constant"
            1, "sigma" sigma_t (default), "linear" 1 - t, "sbdm" g of `Scales.pull`,
            "decreasing" (cos(pi t) + 1)^2 / 4, "increasing_decreasing" sin(pi t)^2.
        last_step: of these: how the last step reaches the data: "mean" (default) by
            the SDE's drift without noise, "euler" by the velocity, "tweedie" by the
            estimate x/alpha + sigma^2/alpha score.
        last_step_size: of these: time left to the last step, in (0, 1); 0.04 by
            default.
        atol, rtol: dopri5: a step's error, as a root mean square over all entries, is
            at most atol + rtol |x| (1e-6, 1e-3).
    """

    sampler: str
    num_steps: int
    clip: float | None = None
    eta: float | None = None
    diffusion: str | None = None
    last_step: str | None = None
    last_step_size: float | None = None
    atol: float | None = None
    rtol: float | None = None

    def __post_init__(self):
        self._check_owners()
        least = 1 if self.sampler in ("euler", "heun", "dopri5") else 2
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
            raise unknown(
                f"sampler {self.sampler}", "diffusion", self.diffusion, DIFFUSIONS
            )
        if self.last_step is not None and self.last_step not in LAST_STEPS:
            raise unknown(
                f"sampler {self.sampler}", "last_step", self.last_step, LAST_STEPS
            )
        if self.last_step_size is not None and not 0 < self.last_step_size < 1:
            raise UserError(
                f"sampler {self.sampler}: last_step_size must be in (0, 1); "
                f"got last_step_size={self.last_step_size}. The default is 0.04."
            )

        for name in ("atol", "rtol"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(
                    f"sampler dopri5: {name} must be positive; got {name}={value}. "
                    "The defaults are atol=1e-6, rtol=1e-3."
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
        elif self.sampler in SDES:
            self._check_sde(process)

    def _check_sde(self, flow: Flow) -> None:
        first, last = self.sde_interval(flow)
        if not first < last:
            raise UserError(
                f"sampler {self.sampler}: last_step_size must leave time to the steps "
                f"before it; got last_step_size={self.last_step_size}, which starts at "
                f"{last}, with sampling_cut={first}. Take a smaller one."
            )
        if self.diffusion == "sbdm" and flow.path != "vp" and first == 0:
            raise UserError(
                f"sampler {self.sampler}: diffusion=sbdm is infinite at t = 0 on this "
                f"path; got path={flow.path}, a start at t = 0. Give the process a "
                "sampling_cut, as 1e-3, or take another diffusion."
            )

    def evaluations(self) -> int | None:
        """How often the network is evaluated; None where the samples decide it."""
        if self.sampler == "dopri5":
            return None
        if self.sampler == "sde_heun":
            return 2 * self.num_steps - 1
        return self.num_steps * (2 if self.sampler == "heun" else 1)

    def sde_interval(self, flow: Flow) -> tuple[float, float]:
        """First time of the SDE, and that from which its last step goes to the end."""
        size = 0.04 if self.last_step_size is None else self.last_step_size
        return flow.interval(sampling=True)[0], 1.0 - size


def parse_options(text: str) -> dict[str, float | str]:
    """{option: value} of "diffusion=linear,last_step=tweedie"; none for "".

    Raises:
        ValueError: for text of another form, an option twice or one that no sampler
            has, and numbers that are none.
    """
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals or not value or name in found:
            raise ValueError(
                "sampler_options must be options with their values, each once, as "
                f"'diffusion=linear,last_step=tweedie'; got {text!r}."
            )
        if name not in OWNERS:
            raise ValueError(
                f"sampler_options: unknown option {name!r}. {nearest(name, OWNERS)}"
            )
        found[name] = value if name in NAMED else _number(name, value)
    return found


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(
            f"sampler_options: {name} must be a number; got {value!r}."
        ) from None


def default_sampler(process: Gaussian | Flow) -> str:
    """The sampler of a process where none is named: without noise on the way."""
    return "ddim" if isinstance(process, Gaussian) else "heun"

"""The options of a noising process, as a config gives them."""

import dataclasses
from typing import Literal

from attnjax.tasks.denoising.flow import Flow
from attnjax.tasks.denoising.gaussian import Gaussian

PROCESSES = {"gaussian": Gaussian, "flow": Flow}


@dataclasses.dataclass(frozen=True)
class Config:
    """A noising process; an option that is left out has its process's default.

    Attributes:
        process: "gaussian" (denoising diffusion, as DiT) or "flow" (flow matching, as
            SiT).
        target: what the network predicts. gaussian: eps (default), v or x0; flow:
            velocity (default), noise or score.
        steps: gaussian: number of noising steps (1000).
        schedule: gaussian: linear (default) or cosine.
        learn_sigma: gaussian: whether the network learns the variance of a step back,
            in as many channels again (true).
        vlb_weight: gaussian: weight of the variational bound that teaches it, in bits
            per dimension (1.0).
        variance: gaussian: posterior (default) or beta, where it is not learned.
        path: flow: linear (default), gvp or vp.
        weighting: flow: of the losses of a noise or a score: none (default), velocity
            or likelihood.
        training_cut: flow: times of training keep this far from the ends.
        sampling_cut: flow: times of sampling keep this far from the ends.
    """

    process: Literal["gaussian", "flow"] = "gaussian"
    target: Literal["eps", "v", "x0", "velocity", "noise", "score"] | None = None
    steps: int | None = None
    schedule: Literal["linear", "cosine"] | None = None
    learn_sigma: bool | None = None
    vlb_weight: float | None = None
    variance: Literal["posterior", "beta"] | None = None
    path: Literal["linear", "gvp", "vp"] | None = None
    weighting: Literal["none", "velocity", "likelihood"] | None = None
    training_cut: float | None = None
    sampling_cut: float | None = None

    def __post_init__(self):
        if self.process not in PROCESSES:
            raise ValueError(
                f"process must be one of {', '.join(sorted(PROCESSES))}; "
                f"got {self.process!r}."
            )
        known = PROCESSES[self.process].__dataclass_fields__
        foreign = sorted(set(self._given()) - set(known))
        if foreign:
            raise ValueError(
                f"{', '.join(foreign)} is of the other process; got process="
                f"{self.process}. Its options are {', '.join(known)}."
            )
        self.make()

    def _given(self) -> dict:
        """The options that are not left out."""
        values = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }
        del values["process"]
        return {name: value for name, value in values.items() if value is not None}

    def make(self) -> Gaussian | Flow:
        """The process.

        Raises:
            ValueError: for values that it refuses.
        """
        return PROCESSES[self.process](**self._given())

"""Noising processes: how data become noise, and what is learned of the way back.

Both processes have one interface; arrays are batched over the first axis, channels are
the last: `sample_times`, `embedded`, `noised`, `output_channels`, `losses`, `level` and
`prediction`. No network lives here.
"""

from attnjax.tasks.denoising.common import Prediction
from attnjax.tasks.denoising.config import Config
from attnjax.tasks.denoising.flow import Flow
from attnjax.tasks.denoising.gaussian import Gaussian

__all__ = ["Config", "Flow", "Gaussian", "Prediction", "make"]


def make(config: Config) -> Gaussian | Flow:
    """The noising process that a config describes."""
    return config.make()

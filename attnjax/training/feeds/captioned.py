"""Images with captions for denoisers that read text."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from attnjax.core.errors import UserError
from attnjax.data.images import captions
from attnjax.models import mmdit, text_encoder
from attnjax.training.feeds.diffusion import DiffusionFeed


class CaptionedFeed(DiffusionFeed):
    """Images for `models.mmdit` and `tasks.diffusion`; captions are made of the names
    of their classes."""

    model_module = mmdit
    model_class = mmdit.MMDiT
    size_names = ("image_size", "channels")

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        """See `Feed`."""
        super().check(config)
        method = config["train"]["init_convert"]
        if method is not None:
            raise UserError(
                "config.train.init_convert: converts layers of one stream; got "
                f"init_convert={method}, config.model.name=mmdit. Set it to none."
            )

    # ---- the model

    def sizes(self) -> dict[str, int]:
        """{"image_size", "channels"}.

        Raises:
            UserError: for a class whose caption is longer than the model reads.
        """
        self.told(np.zeros(0, np.int32))
        return self._sizes(0)

    def planned_sizes(self) -> dict[str, int]:
        """See `Feed`."""
        return self._sizes(0)

    def _sizes(self, num_classes: int) -> dict[str, int]:
        return dict(zip(self.size_names, self.image_shape, strict=True))

    @staticmethod
    def sizes_of(model: Any) -> dict[str, int]:
        """See `Feed`."""
        return {"image_size": model.image_size, "channels": model.channels}

    def fit_cures(self, model: Any) -> list[str]:
        """See `Feed`: a table of positions is as large as it is."""
        return []

    # ---- the captions

    @cached_property
    def captions(self) -> np.ndarray:
        """int32 [classes, M]: the caption of each class."""
        return self.encoded(self.corpus.class_names)

    def encoded(self, class_names) -> np.ndarray:
        """int32 [classes, M]: captions of classes by their names."""
        length = self.config["model"]["text"]["max_len"]
        rows = [
            text_encoder.encode(
                text, length, owner=f"config.data.name={self.data.name}"
            )
            for text in captions.of_classes(self.data, class_names)
        ]
        return np.stack(rows)

    @property
    def told_shape(self) -> tuple[int, ...]:
        """See `DiffusionFeed`."""
        return (self.config["model"]["text"]["max_len"],)

    def told(self, labels: np.ndarray) -> np.ndarray:
        """See `DiffusionFeed`: captions [B, M]."""
        return self.captions[labels]

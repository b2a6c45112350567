"""Images with labels for classifiers of several resolutions."""

from collections.abc import Mapping
from typing import Any

from attnjax.core.errors import UserError
from attnjax.models import pyramid
from attnjax.training.feeds.images import ImageFeed


class PyramidFeed(ImageFeed):
    """Images for `models.pyramid` and `tasks.classification`."""

    model_module = pyramid
    model_class = pyramid.Pyramid

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        """See `Feed`."""
        super().check(config)
        method = config["train"]["init_convert"]
        if method is not None:
            raise UserError(
                "config.train.init_convert: converts layers of models of one width; "
                f"got init_convert={method}, config.model.name=pyramid. Set it to none."
            )

    def search_facts(self, model: Any) -> dict[str, int]:
        """See `Feed`: the tokens of a mean layer, if it were as wide as the first."""
        sizes = [stage.num_tokens * stage.dims.embed_dim for stage in model.stages]
        total = sum(
            len(stage.names) * size
            for stage, size in zip(model.stages, sizes, strict=True)
        )
        mean = total // (len(model.names) * model.dims.embed_dim)
        return super().search_facts(model) | {"seq_len": max(1, mean)}

    def fit_cures(self, model: Any) -> list[str]:
        """See `Feed`: no parameter is bound to the size of the images."""
        return []

"""Opening a run: its config, model, parameters and tokenizer, without its data."""

import dataclasses
import json
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core import schema
from attnjax.core.context import Context
from attnjax.core.errors import UserError, unknown
from attnjax.data import tokenizers
from attnjax.data.images import LatentFacts
from attnjax.data.vae import Vae
from attnjax.decoding import draw_flags, pictures
from attnjax.decoding.generation import generate
from attnjax.decoding.sampling import Sampler
from attnjax.models import text_encoder
from attnjax.models.layout import Layout, relayout
from attnjax.training import experiment, feeds, state_tree
from attnjax.training.checkpoint_reader import CheckpointReader
from attnjax.training.feeds.images import load_classes, load_latents
from attnjax.training.feeds.text import TOKENIZER
from attnjax.training.settings import DrawConfig

# The name of the label that says nothing ("none" is a word of command lines).
NO_CLASS = "no_class"


@dataclasses.dataclass
class Loaded:
    """A run in memory, for notebooks and for the front doors.

    Attributes:
        path: the run directory.
        config: its resolved config, the MLP width settled.
        model: the model's static description.
        params, buffers: its arrays; the averaged ones where the run kept them.
        step: the step of the checkpoint.
    """

    path: Path
    config: dict
    model: Any
    params: dict
    buffers: dict
    step: int


@dataclasses.dataclass
class LoadedClassifier(Loaded):
    """A classifier of images.

    Attributes:
        class_names: one a class, in the order of the logits.
    """

    class_names: tuple[str, ...]

    def logits(self, images: np.ndarray) -> np.ndarray:
        """float32 [B, classes] of images [B, H, W, Ch], normalised as the run's."""
        images = jnp.asarray(images, jnp.float32)
        own = self.model
        wanted = (own.image_size, own.image_size, own.channels)
        if images.shape[1:] != wanted:
            raise UserError(
                f"logits: images must be [B, H, W, Ch] with H, W, Ch = {wanted}; got "
                f"shape {images.shape}."
            )
        return np.asarray(_image_logits(own, self.params, self.buffers, images))

    def name(self, images: np.ndarray) -> list[str]:
        """The likeliest class of each image."""
        return [self.class_names[i] for i in np.argmax(self.logits(images), axis=-1)]


@dataclasses.dataclass
class LoadedDenoiser(Loaded):
    """A denoiser of images.

    Attributes:
        class_names: one a class, in the order of the labels.
    """

    class_names: tuple[str, ...]

    @cached_property
    def feed(self) -> feeds.DiffusionFeed:
        """What it learned from; its data is not opened."""
        return feeds.make(self.config)

    @cached_property
    def latents(self) -> LatentFacts | None:
        """How the latents that it learned were made; None of a run on pixels."""
        return load_latents(self.path) if self.feed.data.is_latent else None

    @cached_property
    def task(self):
        """What it learned, with its noising process."""
        return self.feed.make_task(self.model)

    def labels(self, names: Sequence[str | int]) -> np.ndarray:
        """int32 labels of classes, by name or number; "no_class" of a model that
        was also trained without them."""
        nothing = self.model.null_label
        found = [self._number(name) for name in names]
        return np.asarray([nothing if n is None else n for n in found], np.int32)

    def _number(self, name: str | int) -> int | None:
        """The number of a class; None for no class."""
        if isinstance(name, str) and name in self.class_names:
            return self.class_names.index(name)
        if str(name).isdecimal() and int(name) < len(self.class_names):
            return int(name)
        if name == NO_CLASS and self.model.null_label is not None:
            return None
        more = () if self.model.null_label is None else (NO_CLASS,)
        raise unknown("labels", "class", str(name), (*self.class_names, *more))

    def draw(self, labels: Sequence[str | int], **settings: Any) -> np.ndarray:
        """float32 images [B, H, W, Ch], normalised as its training data.

        Args:
            labels: B classes, by name or number, or "no_class".
            settings: of `draw_settings`.

        Raises:
            UserError: for an unknown class or sampler, guidance that the model was
                not trained for, or too few steps of dopri5.
        """
        return self.draw_counted(labels, **settings)[0]

    def draw_counted(
        self, labels: Sequence[str | int], **settings: Any
    ) -> tuple[np.ndarray, int]:
        """What `draw` gives, and how often the sampler asked for a prediction."""
        return self.draw_told(self.labels(labels), **settings)

    def draw_told(self, told: np.ndarray, **settings: Any) -> tuple[np.ndarray, int]:
        """`draw_counted` of what the model is told: int32 [B] as from `labels`."""
        chosen = self.draw_settings(**settings)
        state = (self.task, self.params, self.buffers, told)
        images, evaluations = pictures.draw(*state, settings=chosen)
        images = np.asarray(images)
        if chosen.sampler == "dopri5" and not np.all(np.isfinite(images)):
            raise UserError(
                "sampler dopri5: the steps that it may try must suffice; got "
                f"steps={chosen.steps}, which did not reach the data. Raise steps "
                "(--num_steps), or sampler_options=rtol=..., or take heun."
            )
        return images, int(evaluations)

    def draw_settings(self, **settings: Any) -> DrawConfig:
        """How images are drawn, checked against the model.

        Args:
            settings: fields of `training.settings.DrawConfig`: those that
                `draw_flags.FIELDS` names.

        Raises:
            UserError: for values out of range, guidance that the model was not trained
                for, or heads to perturb that it does not have.
        """
        draw_flags.check_names(settings)
        try:
            chosen = DrawConfig(**settings)
        except ValueError as error:
            raise UserError(f"draw: {error}") from error
        pictures.check(self.task, chosen)
        return chosen

    def pixels(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, Ch] of normalised images or latents: `pictures.pixels`."""
        return pictures.pixels(images, self.feed.data)

    def require_latents(self, owner: str) -> LatentFacts:
        """How its latents were made; UserError for a run on pixels."""
        if self.latents is None:
            raise UserError(
                f"{owner}: decodes latents, and {self.path} learned pixels; got "
                f"config.data.name={self.config['data']['name']}. Leave it out."
            )
        return self.latents

    def decoded(self, latents: np.ndarray, vae: Vae) -> np.ndarray:
        """uint8 [B, H, W, Ch]: what an autoencoder makes of latents as drawn.

        Raises:
            UserError: for a run on pixels, or latents of other channels.
        """
        return vae.pictures(self.require_latents("decoded").unscaled(latents))


@dataclasses.dataclass
class LoadedCaptioned(LoadedDenoiser):
    """A denoiser of images that reads captions."""

    def labels(self, names: Sequence[str | int]) -> np.ndarray:
        """int32 [B, M]: the captions of classes, by name or number; the empty one of
        "no_class"."""
        table = self.feed.encoded(self.class_names)
        rows = [self._number(name) for name in names]
        return np.stack(
            [self.model.null_label if n is None else table[n] for n in rows]
        ).astype(np.int32)

    def prompts(self, texts: Sequence[str]) -> np.ndarray:
        """int32 [B, M]: the ids of captions.

        Raises:
            UserError: for a caption that is too long or no UTF-8, and for an empty one
                of a model that was always told a caption.
        """
        length, owner = self.model.num_text, "prompt"
        if "" in texts and self.model.null_label is None:
            raise UserError(
                "prompt: the empty caption needs a model that was also trained without "
                "captions; got '', config.model.caption_dropout=0. Train with "
                "--config.model.caption_dropout=0.1, or write a caption."
            )
        rows = [text_encoder.encode(text, length, owner=owner) for text in texts]
        return np.stack(rows)

    def draw_prompts(self, texts: Sequence[str], **settings: Any) -> np.ndarray:
        """`draw`, of captions instead of classes."""
        return self.draw_told(self.prompts(texts), **settings)[0]


@dataclasses.dataclass
class LoadedRun(Loaded):
    """A language model.

    Attributes:
        tokenizer: its tokenizer.
    """

    tokenizer: Any

    @cached_property
    def arrays(self) -> dict:
        """The arrays as the decoder wants them."""
        return self.model.unstack(self.params, self.buffers)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, after the token that begins texts where there is one;
        never empty: an empty text is one separator."""
        start = self.tokenizer.start
        ids = [] if start is None else [start]
        ids += [int(i) for i in self.tokenizer.encode(text)]
        if ids:
            return ids
        return [self.tokenizer.separator or 0]

    def logits(self, text_or_ids: str | Sequence[int]) -> np.ndarray:
        """float32 [T, V]: the next-token logits at each token of one sequence."""
        ids = self.encode(text_or_ids) if isinstance(text_or_ids, str) else text_or_ids
        tokens = jnp.asarray([ids], jnp.int32)
        prefix = self.config["task"]["prefix_len"]
        ctx = Context(
            positions=jnp.arange(tokens.shape[1])[None],
            prefix_len=jnp.asarray([prefix]) if prefix else None,
        )
        logits = _logits(self.model, self.params, self.buffers, tokens, ctx)
        return np.asarray(logits[0])

    def generate(
        self,
        prompt: str | Sequence[str] = "\n",
        *,
        max_new_tokens: int = 200,
        num: int = 1,
        sampler: Sampler | None = None,
        seed: int = 0,
    ) -> list[str]:
        """Continuations of a prompt (`num` of them) or of several prompts.

        Returns:
            The new text alone, one string a continuation.
        """
        prompts = [prompt] * num if isinstance(prompt, str) else list(prompt)
        rows = generate(
            self.model,
            self.arrays,
            [self.encode(p) for p in prompts],
            max_new_tokens=max_new_tokens,
            sampler=sampler or Sampler(),
            seed=seed,
            stop_token=self.tokenizer.separator,
            prefix_len=self.config["task"]["prefix_len"],
        )
        return [self.tokenizer.decode(np.asarray(row, np.int64)) for row in rows]


@partial(jax.jit, static_argnums=0)
def _logits(model, params, buffers, tokens, ctx):
    hidden, _ = model.hidden(params, buffers, tokens, ctx)
    return model.logits(params, hidden)


@partial(jax.jit, static_argnums=0)
def _image_logits(model, params, buffers, images):
    ctx = model.context(batch=images.shape[0], prng_key=None, train=False, rows=None)
    return model.logits(params, buffers, images, ctx)[0]


def require_text(config: dict, owner: str) -> None:
    """Raise UserError unless a run's config is that of a language model."""
    name = config["model"]["name"]
    if feeds.feed_class(config["model"]).unit != "token":
        raise UserError(
            f"{owner}: needs a language model; got a run with config.model.name={name}."
            " Its numbers: python -m attnjax.evaluate --workdir RUN"
        )


def require_denoiser(run: Loaded, *, owner: str = "--judge") -> LoadedDenoiser:
    """The run, if it is one of a denoiser; UserError, of `owner`, if not."""
    if not isinstance(run, LoadedDenoiser):
        raise UserError(
            f"{owner}: looks at the samples of a denoiser; got {run.path}, "
            f"config.model.name={run.config['model']['name']}. Leave it out."
        )
    return run


def read_config(path: Path, *, owner: str = "--workdir") -> dict:
    """The resolved config of a run directory; `owner` named it, for messages."""
    file = path / "config.json"
    if not file.is_file():
        raise UserError(
            f"{owner}: {str(path)!r} is not a run directory (it has no config.json). "
            "Make one with: python -m attnjax.train --config FILE --workdir "
            f"{path}"
        )
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{owner}: cannot read {file}: {error}.") from error


def load_run(
    workdir: str | Path,
    *,
    step: int | None = None,
    overrides: Sequence[tuple[str, Any]] = (),
    keep_layers: Sequence[int] | None = None,
    owner: str = "--workdir",
) -> LoadedRun | LoadedClassifier | LoadedDenoiser:
    """Open a run on this machine, whatever machine trained it.

    Args:
        workdir: the run directory.
        step: the checkpoint; None takes the newest intact one.
        overrides: (dotted key, value) changes to its config, texts as on a command
            line. They may change how the model is run, not what parameters it has.
        keep_layers: the layers (from 0) that stay, the others are left out; None
            keeps all.
        owner: what named the directory, for messages.

    Raises:
        UserError: when it is no run directory, no intact checkpoint is in it, or the
            changes ask for other parameters.
    """
    path = Path(workdir)
    config = read_config(path, owner=owner)
    reader = CheckpointReader(path / "checkpoints")
    if step is None:
        found = reader.latest()
        if found is None:
            raise UserError(
                f"{owner}: {path} has no checkpoint yet. Train it first with: python "
                f"-m attnjax.train --workdir {path}"
            )
        step = found.step
    groups = ("params", "buffers") + (
        ("ema",) if config["optim"]["ema_decay"] is not None else ()
    )
    state, meta = reader.restore_numpy(step, only=groups)
    source = Layout.from_json(meta["layout"])
    config = _settled(config, meta)
    config = _changed(config, source, overrides, keep_layers)
    model = experiment.build_model(config, meta)
    params = state.get("ema", state["params"])
    params, buffers = _relaid(params, state["buffers"], source, model, keep_layers)
    found = (path, config, model, params, buffers, step)
    kind = feeds.feed_class(config["model"])
    if issubclass(kind, feeds.ImageFeed):
        return _image_run(kind)(*found, load_classes(path))
    return LoadedRun(*found, tokenizers.load_tokenizer(path / TOKENIZER))


def _image_run(kind: type[feeds.Feed]) -> type[Loaded]:
    """What a run on images is opened as."""
    if issubclass(kind, feeds.CaptionedFeed):
        return LoadedCaptioned
    return LoadedDenoiser if issubclass(kind, feeds.DiffusionFeed) else LoadedClassifier


def _settled(config: dict, meta: dict) -> dict:
    """A run's config with the MLP width that config.model.params found for it, which
    other layers would change."""
    if config["model"].get("params") is None:
        return config
    model = experiment.build_model(config, meta)
    return {**config, "model": schema.to_json(model.config)}


def _changed(config: dict, source: Layout, overrides, keep_layers) -> dict:
    """The run's config with what the caller wants otherwise."""
    if not overrides and keep_layers is None:
        return config
    if keep_layers is not None:
        depth = len(source.names)
        if not keep_layers or any(not 0 <= layer < depth for layer in keep_layers):
            raise UserError(
                f"keep_layers: must name layers from 0 to {depth - 1}; got "
                f"{list(keep_layers)}."
            )
        names = [source.names[layer] for layer in keep_layers]
        mixers = {k: v for k, v in config["model"]["mixers"].items() if k in names}
        model = {"layers": names, "num_layers": None, "mixers": mixers}
        config = {**config, "model": {**config["model"], **model}}
    return experiment.changed(config, overrides)


def _relaid(params, buffers, source: Layout, model, keep_layers) -> tuple[dict, dict]:
    """The saved arrays in the layout of `model`, which must want just these."""
    wanted = model.layout
    kept = range(len(source.names)) if keep_layers is None else keep_layers
    if len(kept) != len(wanted.names):
        raise UserError(
            f"config.model.layers: the run has {len(kept)} layers; got "
            f"{len(wanted.names)} ({' '.join(wanted.names)}). Leave layers out with "
            "keep_layers."
        )
    params = dict(params)
    params["layers"] = relayout(params["layers"], source, wanted, keep=keep_layers)
    layers = relayout(buffers["layers"], source, wanted, keep=keep_layers)
    wanted_arrays = jax.eval_shape(model.init, 0)
    # Layers that are left out may take their extra streams with them.
    streams = {
        name: start
        for name, start in buffers.get("streams", {}).items()
        if name in wanted_arrays[1]["streams"]
    }
    buffers = {**buffers, "layers": layers, "streams": streams}
    have = state_tree.signature(state_tree.named((params, buffers)))
    want = state_tree.signature(state_tree.named(wanted_arrays))
    lines = state_tree.differences(have, want)
    if lines:
        raise UserError(
            "config.model: these settings ask for other parameters than the run has (- "
            "has, + wanted):\n" + "\n".join(lines[:12])
        )
    return jax.tree.map(jnp.asarray, (params, buffers))


def sample(here: experiment.Experiment, state: dict) -> str | np.ndarray:
    """What a run makes to be looked at: text, or a picture uint8 [H, W(, 3)]."""
    if here.feed.draws:
        return pictures.sample_sheet(here, state)
    return sample_text(here, state)


def sample_text(here: experiment.Experiment, state: dict) -> str:
    """The sample at the end of a run: `config.train.sample_tokens` from a newline."""
    params = state.get("ema", state["params"])
    run = LoadedRun(
        Path(),
        here.config,
        here.model,
        params,
        state["buffers"],
        int(state["step"]),
        here.corpus.tokenizer,
    )
    count = here.train.sample_tokens
    if here.model.config.positions == "learned":
        count = min(count, here.model.config.max_len - 1)
    return run.generate(max_new_tokens=count, sampler=Sampler(0.8), seed=0)[0]

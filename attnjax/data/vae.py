"""Autoencoders that a user has, run by PyTorch: pictures to latents, and back.

A folder as diffusers saves one, of an `AutoencoderKL`: config.json beside the weights,
or the same in DIR/vae, as in the folder of a whole pipeline. Imported lazily: torch and
diffusers.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from attnjax.core.errors import UserError

KIND = "AutoencoderKL"
INSTALL = "pip install 'attnjax[vae]'"
WEIGHTS = ("*.safetensors", "*.bin")
_BLOCK = 1 << 22


@dataclasses.dataclass(frozen=True, eq=False)
class Vae:
    """An autoencoder.

    Attributes:
        path: its folder.
        fingerprint: hex digest of its config and weights.
        pixel_channels: of pictures.
        channels: C, of latents.
        factor: pixels of a picture's side for one of a latent's.
        scale, shift: one number, or one a channel: diffusers' pipelines hand a denoiser
            (z - shift) scale.
        device: where it runs.
    """

    path: Path
    fingerprint: str
    pixel_channels: int
    channels: int
    factor: int
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    device: str
    _model: Any = dataclasses.field(repr=False)

    @property
    def facts(self) -> dict[str, Any]:
        """What a folder of latents says of it."""
        own = self.path.name
        # Inside a pipeline every one of them is called so.
        name = f"{self.path.parent.name}/{own}" if own == "vae" else own
        return {"name": name, "kind": KIND, "fingerprint": self.fingerprint}

    def latent_side(self, side: int) -> int:
        """H = W of the latents of pictures.

        Raises:
            UserError: for a side that cannot be halved so often.
        """
        if side % self.factor:
            raise UserError(
                f"--vae: halves pictures to 1/{self.factor} of their side; got "
                f"config.data.image_size={side}. Use a multiple of {self.factor}."
            )
        return side // self.factor

    def moments(self, pictures: np.ndarray) -> np.ndarray:
        """float32 [B, h, w, 2 C]: mean and log-variance of the posterior.

        Args:
            pictures: uint8 [B, H, W, Ch]; the network sees them in [-1, 1].
        """
        import torch

        shown = pictures.astype(np.float32).transpose(0, 3, 1, 2) / 127.5 - 1.0
        with torch.no_grad(), _faults(torch, self.device):
            x = torch.from_numpy(np.ascontiguousarray(shown)).to(self.device)
            found = self._model.encode(x).latent_dist
            both = torch.cat([found.mean, found.logvar], dim=1)
            return both.permute(0, 2, 3, 1).float().cpu().numpy()

    def pictures(self, latents: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, Ch] of latents float [B, h, w, C], without scale and shift.

        Raises:
            UserError: for another number of channels.
        """
        if latents.shape[-1] != self.channels:
            raise UserError(
                f"--vae: decodes latents of {self.channels} channels; got "
                f"{latents.shape[-1]}. Name the autoencoder that made them."
            )
        import torch

        z = np.ascontiguousarray(latents.transpose(0, 3, 1, 2), np.float32)
        made = []
        with torch.no_grad(), _faults(torch, self.device):
            # One at a time: decoders need much memory.
            for one in torch.from_numpy(z).split(1):
                x = self._model.decode(one.to(self.device)).sample
                made.append(x.permute(0, 2, 3, 1).float().cpu().numpy())
        shown = np.round(127.5 * (np.concatenate(made) + 1.0))
        return np.clip(shown, 0, 255).astype(np.uint8)


def open_vae(path: str | os.PathLike, *, device: str = "cpu") -> Vae:
    """The autoencoder of a folder, in float32.

    Args:
        path: the folder; nothing is downloaded.
        device: PyTorch's name of it, e.g. "cuda".

    Raises:
        UserError: no such folder, another kind of network, missing packages, weights
            that do not load, or a device that is not there.
    """
    folder = _folder(Path(path).expanduser())
    config = _config(folder)
    torch, diffusers = library("--vae")
    try:
        model = getattr(diffusers, KIND).from_pretrained(
            folder,
            local_files_only=True,
            torch_dtype=torch.float32,
            # It would take one more package.
            low_cpu_mem_usage=False,
        )
    # Loaders fail in every way there is.
    except Exception as error:
        raise UserError(
            f"--vae: the autoencoder must load; got {str(folder)!r}: "
            f"{_line(error)}. Save it again with diffusers."
        ) from error
    with _faults(torch, device):
        model = model.to(device).eval()
    own = model.config
    std = own.get("latents_std") or (1.0,)
    return Vae(
        path=folder,
        fingerprint=_fingerprint(folder, config),
        pixel_channels=own.in_channels,
        channels=own.latent_channels,
        factor=2 ** (len(own.block_out_channels) - 1),
        scale=tuple(float(own.scaling_factor / s) for s in std),
        shift=_shift(own),
        device=device,
        _model=model,
    )


def library(owner: str) -> tuple[Any, Any]:
    """The modules torch and diffusers.

    Raises:
        UserError: one of them is not installed.
    """
    try:
        import diffusers
        import torch
    except ImportError as error:
        raise UserError(
            f"{owner}: an autoencoder is run by torch and diffusers; got {error}. "
            f"Install them with: {INSTALL}"
        ) from error
    return torch, diffusers


def _folder(path: Path) -> Path:
    """The folder that holds the config: `path`, or vae inside it."""
    for folder in (path, path / "vae"):
        if (folder / "config.json").is_file():
            return folder.resolve()
    found = "has no config.json" if path.is_dir() else "is no folder"
    raise UserError(
        f"--vae: must be the folder of an {KIND} as diffusers saves it; got "
        f"{str(path)!r}, which {found}. Download it first, or save it with "
        "vae.save_pretrained(DIR)."
    )


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_bytes())
        kind = config.get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"--vae: config.json must be JSON; got {str(folder)!r}: {_line(error)}. "
            "Save it again with diffusers."
        ) from error
    if kind != KIND:
        raise UserError(
            f"--vae: must be an {KIND}; got {kind} in {str(folder)!r}. Encode its "
            "latents with its own code, and write them with latent_files.new_latents "
            "(docs/dit.md)."
        )
    return config


def _shift(own: Any) -> tuple[float, ...]:
    """What is taken off latents: a mean a channel, or one number for all."""
    if own.get("latents_mean"):
        return tuple(float(mean) for mean in own.latents_mean)
    return (float(own.get("shift_factor") or 0.0),)


def _fingerprint(folder: Path, config: dict[str, Any]) -> str:
    """Of the config, without what says which diffusers wrote it, and of the weights."""
    plain = {name: v for name, v in config.items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for path in sorted(p for kind in WEIGHTS for p in folder.glob(kind)):
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(_BLOCK), b""):
                digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _faults(torch: Any, device: str) -> Iterator[None]:
    """Say what a device cannot do."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device: PyTorch cannot run the autoencoder on it; got device={device}: "
            f"{_line(error)}. Use --device cpu, or a smaller --batch_size."
        ) from error


def _line(error: Exception) -> str:
    """The first line of an error's text, without its full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(". ")

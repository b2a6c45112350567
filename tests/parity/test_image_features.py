"""TorchScript networks: what they are given, and what is made of their answers."""

import types

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="extra `parity` is not installed")

from attnjax.analysis import image_features  # noqa: E402
from attnjax.core.errors import UserError  # noqa: E402

pytestmark = pytest.mark.parity
SIDE = 6


class Moments(torch.nn.Module):
    """Means and mean squares of the channels, of pictures of one size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[2] == 6
        x = x.float()
        return torch.cat([x.mean(dim=[2, 3]), (x**2).mean(dim=[2, 3])], dim=1)


class OnRequest(torch.nn.Module):
    """As Inception is handed round: classes, and features where they are asked for."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        means = x.float().mean(dim=[2, 3])
        return means if return_features else torch.softmax(means, dim=1)


class Pair(torch.nn.Module):
    """No tensor [N, F]."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


class Broken(torch.nn.Module):
    """Features that are no numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().mean(dim=[2, 3]) / 0.0


@pytest.fixture
def opened(tmp_path):
    """Scripts a network, saves it, and opens the file."""

    def make(network, size=None, pixels=None):
        path = tmp_path / f"{type(network).__name__}.pt"
        torch.jit.save(torch.jit.script(network), str(path))
        return image_features.open_network(
            f"torchscript:{path}", size=size, pixels=pixels
        )

    return make


def pictures(count, seed, channels=3):
    rng = np.random.default_rng(seed)
    low, high = sorted(rng.integers(0, 256, 2))
    return rng.integers(low, high + 9, (count, SIDE, SIDE, channels)).astype(np.uint8)


def test_features_are_the_networks(opened):
    given = pictures(11, 0)
    for pixels, seen in (
        ("uint8", given.astype(float)),
        ("unit", given / 255),
        ("signed", given / 127.5 - 1),
    ):
        network = opened(Moments(), pixels=pixels)
        wanted = np.concatenate([seen.mean((1, 2)), (seen**2).mean((1, 2))], axis=1)
        np.testing.assert_allclose(
            network.features(given), wanted, rtol=1e-4, atol=1e-5
        )
    assert network.name.startswith("Moments.pt (sha256 ")
    np.testing.assert_allclose(
        opened(OnRequest()).features(given), given.mean((1, 2)), rtol=1e-5
    )


def test_the_distance_of_scripted_features_has_its_closed_form(opened):
    """Of one feature that matters: (m - m')^2 + (s - s')^2."""

    class First(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float().mean(dim=[2, 3])[:, :1]

    sets = {"train": pictures(23, 1, 1), "eval": pictures(13, 2, 1)}
    splits = {
        name: types.SimpleNamespace(
            name=name,
            num_images=len(given),
            read=lambda part, x=given: (x[part], None, np.ones(len(part), bool)),
        )
        for name, given in sets.items()
    }
    run = types.SimpleNamespace(
        pixels=lambda x: x,
        feed=types.SimpleNamespace(corpus=types.SimpleNamespace(**splits)),
    )
    drawn = pictures(61, 3, 1)
    found = image_features.feature_distances(run, drawn, opened(First()))
    means = [x.mean((1, 2, 3)) for x in (drawn, sets["train"], sets["eval"])]
    stats = [(x.mean(), x.std(ddof=1)) for x in means]

    def distance(one, other):
        return (one[0] - other[0]) ** 2 + (one[1] - other[1]) ** 2

    wanted = distance(stats[0], stats[1]), distance(stats[2], stats[1])
    names = ("frechet_distance", "frechet_distance_held_out")
    assert [found[n] for n in names] == pytest.approx(wanted, rel=1e-4)
    assert found["features"].startswith("torchscript:First.pt (sha256 ")


def test_networks_that_do_not_fit_are_refused(opened, tmp_path):
    given = pictures(3, 4)
    with pytest.raises(UserError, match=r"cannot run on .*uint8 \[3, 3, 9, 9\].*_size"):
        opened(Moments(), size=9).features(given)
    with pytest.raises(UserError, match=r"must return a tensor \[N, F\]; got .*tuple"):
        opened(Pair()).features(given)
    with pytest.raises(UserError, match="must be finite"):
        opened(Broken()).features(given)
    states = tmp_path / "states.pth"
    torch.save({"weight": torch.ones(2)}, states)
    with pytest.raises(UserError, match="A state dict holds no network"):
        image_features.open_network(f"torchscript:{states}", size=None, pixels=None)

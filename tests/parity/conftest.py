"""Tiny models of transformers with random weights, saved as folders."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

WHY = "extra `parity` is not installed"


@pytest.fixture(scope="session")
def torch():
    return pytest.importorskip("torch", reason=WHY)


@pytest.fixture(scope="session")
def transformers():
    return pytest.importorskip("transformers", reason=WHY)


@pytest.fixture(scope="session", autouse=True)
def one_thread(torch):
    """Small products are fastest so, and tests run side by side."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def unset_is_nan(torch):
    """Memory that a module leaves unset is NaN each time, not now and then."""
    torch.use_deterministic_algorithms(True)


@pytest.fixture(scope="session")
def randomise(torch):
    """Gives every parameter of a torch module values that matter: norms and biases
    too, whose starts are constants."""

    def fill(module, seed=0, scale=0.15):
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                noise = torch.randn(parameter.shape, generator=draw)
                is_start = parameter.ndim == 1
                parameter.copy_(noise * scale + (parameter if is_start else 0.0))
        return module.eval()

    return fill


@pytest.fixture(scope="session")
def saved(tmp_path_factory, randomise, transformers):
    """(name, config, dtype=None, **save_pretrained) -> model and folder."""

    def make(name, config, dtype=None, **options):
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="eager"
        )
        model = randomise(model)
        if dtype is not None:
            model = model.to(dtype)
        folder = tmp_path_factory.mktemp(name) / "theirs"
        model.save_pretrained(folder, **options)
        return model, folder

    return make


@pytest.fixture(scope="session")
def tokens():
    """(vocabulary, rows=2, length=13) -> int64 ids."""

    def draw(vocabulary, rows=2, length=13):
        return np.random.default_rng(5).integers(0, vocabulary, (rows, length))

    return draw

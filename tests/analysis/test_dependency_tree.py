"""Dependency trees of reversed attention, by hand-made masks and a tiny model."""

import functools
import types

import jax
import numpy as np
import pytest
from matplotlib.image import imread

from attnjax.analysis import dependency_tree as analysis
from attnjax.analysis.dependency_tree import NO_PARENT, Board, Trees
from attnjax.conformance.subject import jitted
from attnjax.core import schema
from attnjax.core.context import Hook
from attnjax.core.errors import UserError
from attnjax.models import vit
from attnjax.training import experiment

# Token 2 gets from 0 and 1, and sends a little back; 3 and 4 point at one another; 5
# sends nothing.
MASK = np.array(
    [
        [0.1, 0.0, 0.2, 0.0, 0.0, 0.0],
        [0.0, 0.1, 0.0, 0.0, 0.0, 0.0],
        [0.7, 0.8, 0.1, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.1, 0.5, 0.0],
        [0.0, 0.0, 0.0, 0.4, 0.2, 0.0],
        [0.1, 0.0, 0.0, 0.0, 0.0, 0.0],
    ]
)
# The same with another root: tokens 0 and 2 change places.
TURNED = MASK[np.ix_([2, 1, 0, 3, 4, 5], [2, 1, 0, 3, 4, 5])]


def test_a_parent_is_where_most_of_a_message_goes():
    found = analysis.parents(np.stack([MASK, TURNED]))
    assert found.tolist() == [
        [2, 2, 0, 4, 3, NO_PARENT],
        [2, 0, 0, 4, 3, NO_PARENT],
    ]


def test_the_root_gets_most_from_others_less_what_it_sends_them():
    assert analysis.roots(np.stack([MASK, TURNED])).tolist() == [2, 0]
    # What a token sends itself counts for nothing.
    assert analysis.roots(MASK + np.diag([0, 0, 0, 0, 0, 9.0])) == 2


def test_chains_of_parents_that_end_in_circles_do_not_lead_to_the_root():
    (found,) = analysis.parents(MASK[None])
    leads = [True, True, True, False, False, False]
    assert analysis.leads_to_root(found, 2).tolist() == leads
    line = np.array([0, 0, 1, 2, 3])
    assert analysis.leads_to_root(line, 0).all()
    assert analysis.leads_to_root(line, 2).tolist() == [False] * 2 + [True] * 3


def test_numbers_of_a_layer_are_means_over_tokens_that_send():
    own = MASK + np.diag([0, 9.0, 0, 0, 0, 0])
    found = analysis.summary(Trees(0, np.stack([MASK, own])))
    assert found["message"] == pytest.approx((2 * MASK.sum() + 9.0) / 10)
    assert found["own_parent"] == pytest.approx(1 / 10)
    assert found["to_root"] == pytest.approx((3 + 2) / 10)


def test_patches_lie_in_the_image_and_tokens_before_them_above():
    places = Board((2, 3), extra=2).places()
    assert places[:2].tolist() == [[0.5, -0.5], [1.5, -0.5]]
    assert places[2].tolist() == [0.5, 0.5] and places[-1].tolist() == [2.5, 1.5]
    assert places[4].tolist() == [2.5, 0.5]


def drawn(tmp_path, layers, pictures, board):
    file = tmp_path / "tree.png"
    analysis.draw(pictures, layers, board, file)
    return imread(file)[..., :3]


def test_a_picture_shows_arrows_the_root_and_what_was_left_out(tmp_path):
    """Against the same picture with other parents, another root, or a token more."""
    pictures = np.full((1, 4, 6, 1), 128, np.uint8)
    board = Board((2, 3))
    show = lambda mask: drawn(tmp_path, [Trees(3, mask[None])], pictures, board)  # noqa: E731
    plain = show(MASK)
    star = np.abs(plain - np.array([213, 94, 0]) / 255).max(-1) < 0.1
    assert star.sum() > 20
    assert (
        np.nonzero(star)[1].mean() > 0.6 * plain.shape[1]
    )  # Patch 2: the top row's last.
    turned = show(TURNED)
    star = np.abs(turned - np.array([213, 94, 0]) / 255).max(-1) < 0.1
    assert np.nonzero(star)[1].mean() < 0.4 * plain.shape[1]
    sends = MASK.copy()
    sends[0, 5] = 0.1
    assert (show(sends).mean(-1) > plain.mean(-1) + 0.1).mean() > 0.02


SMALL = dict(embed_dim=8, num_heads=2, patch_size=4, mlp_dim=8, pool="mean")
OWN = (0, 2)


@functools.cache
def model():
    """Two layers of reversed attention around another, and an image's class token."""
    layers = ["dependencyvit", "attention", "dependencyvit"]
    given = {"name": "vit", **SMALL, "layers": layers, "class_token": True}
    given = {"data": {"name": "digits"}, "model": given}
    config = experiment.resolve(given)
    made = vit.ViT(
        schema.build(vit.Config, config["model"]),
        image_size=8,
        channels=1,
        num_classes=10,
    )
    params, buffers = jax.eval_shape(made.init, 0)
    rng = np.random.default_rng(0)
    draw = lambda a: (0.5 * rng.normal(size=a.shape)).astype(a.dtype)  # noqa: E731
    params = jax.tree.map(draw, params)
    return types.SimpleNamespace(
        config=config, model=made, params=params, buffers=buffers
    )


def test_masks_of_a_model_are_the_sums_over_heads_of_its_maps():
    run = model()
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
    arrays = (run.params, run.buffers, images)
    found = analysis.trees_of(run.model, *arrays)
    assert [trees.layer for trees in found] == list(OWN)
    hooks = tuple(Hook(n, n, layers=OWN) for n in ("weights", "message"))

    @jitted
    def record(params, buffers, images):
        ctx = run.model.context(batch=2).replace(hooks=hooks)
        return run.model.hidden(params, buffers, images, ctx)[1].records

    records = record(*arrays)
    for trees in found:
        own = records[trees.layer]
        np.testing.assert_allclose(trees.mask, own["weights"].sum(1), atol=1e-6)
        np.testing.assert_allclose(trees.message, own["message"], atol=1e-6)
        assert trees.parents.shape == (2, 5) and trees.roots.shape == (2,)


def test_the_command_draws_a_run_and_writes_its_arrays(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("attnjax.decoding.run.load_run", lambda *a, **k: model())
    out, arrays = tmp_path / "made" / "trees.png", tmp_path / "trees.npz"
    words = ["--workdir", "run", "--out", str(out), "--num", "2", "--layers", "2,0"]
    analysis.main([*words, "--arrays", str(arrays)])
    told = capsys.readouterr().out
    assert "layer 2: message 0." in told and f"wrote {out}" in told
    height, width, _ = imread(out).shape
    assert width < 1.2 * height  # Two images in two layers, and the bars.
    saved = np.load(arrays)
    assert set(saved) == {f"{n}_{i}" for n in ("mask", "parents", "roots") for i in OWN}
    assert saved["parents_2"].tolist() == analysis.parents(saved["mask_2"]).tolist()


# ---- refusals


def refused(monkeypatch, run, *words, match):
    monkeypatch.setattr("attnjax.decoding.run.load_run", lambda *a, **k: run)
    with pytest.raises(UserError, match=match):
        analysis.main(["--workdir", "run", *words])


def test_runs_and_settings_without_a_tree_are_refused(tmp_path, monkeypatch):
    out = ("--out", str(tmp_path / "a.png"))
    refuse = functools.partial(refused, monkeypatch)
    refuse(model(), "--out", "a.jpg", match="--out: must end in .png or .svg")
    refuse(model(), *out, "--num=33", match="--num: must be from 1 to 32; got 33")
    match = r"layers must be of dependencyvit, which are \[0, 2\]; got \[1\]"
    refuse(model(), *out, "--layers=1", match=match)
    other = types.SimpleNamespace(model=object(), config={"model": {"name": "lm"}})
    refuse(other, *out, match="needs a vision transformer; .* config.model.name=lm")
    config = schema.build(vit.Config, vit.resolve({**SMALL, "layers": "attention"}))
    plain = vit.ViT(config, image_size=8, channels=1, num_classes=10)
    match = "needs layers of dependencyvit; got a model of attention"
    with pytest.raises(UserError, match=match):
        analysis.trees_of(plain, {}, {}, np.zeros((1, 8, 8, 1)))

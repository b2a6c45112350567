import numpy as np
import pytest
from scipy import stats

from attnjax.core.errors import UserError
from attnjax.data.images import (
    Augment,
    batch,
    corpus,
    eval_batches,
    num_eval_batches,
    steps_per_epoch,
)
from attnjax.data.images.batches import mixup_share
from attnjax.data.images.corpus import ImageSplit

ALL = {"flip": True, "randaugment_layers": 2, "mixup": 0.3}
AUGMENTS = {
    "none": Augment(),
    "pad": Augment(crop="pad", pad=2, **ALL),
    "inception": Augment(crop="inception", **ALL),
}


def same(left, right):
    return left.keys() == right.keys() and all(
        np.array_equal(left[name], right[name]) for name in left
    )


@pytest.fixture(params=AUGMENTS)
def augment(request):
    return AUGMENTS[request.param]


def test_a_batch_has_the_promised_arrays(make_split, augment):
    got = batch(
        make_split(channels=3, image_size=4),
        seed=0,
        step=0,
        batch_size=5,
        augment=augment,
    )
    assert {name: (value.shape, value.dtype.name) for name, value in got.items()} == {
        "image": ((5, 4, 4, 3), "float32"),
        "label": ((5,), "int32"),
        "other_label": ((5,), "int32"),
        "mix": ((5,), "float32"),
        "weight": ((5,), "float32"),
    }


def test_a_batch_depends_on_seed_and_step_alone(make_split, augment):
    def ask(split, seed, step):
        return batch(split, seed=seed, step=step, batch_size=7, augment=augment)

    used = make_split()
    for step in (9, 0, 4):
        ask(used, 1, step)
    assert same(ask(used, 1, 5), ask(make_split(), 1, 5))
    assert not same(ask(used, 1, 5), ask(used, 1, 6))
    assert not same(ask(used, 1, 5), ask(used, 2, 5))


@pytest.mark.parametrize("hosts", [2, 3, 6])
def test_hosts_together_hold_the_global_batch(make_split, augment, hosts):
    split, share = make_split(), 6 // hosts
    fixed = {"seed": 3, "step": 8, "batch_size": 6, "augment": augment}
    whole = batch(split, **fixed)
    parts = [
        batch(split, **fixed, rows=slice(host * share, (host + 1) * share))
        for host in range(hosts)
    ]
    joined = {name: np.concatenate([p[name] for p in parts]) for name in whole}
    assert same(whole, joined)


def test_any_slice_of_the_global_batch_can_be_asked_for(make_split, augment):
    split = make_split()
    fixed = {"seed": 3, "step": 4, "batch_size": 9, "augment": augment}
    whole = batch(split, **fixed)
    for rows in (slice(None, None, -2), slice(4, 4), slice(8, None), slice(3, 4)):
        part = batch(split, **fixed, rows=rows)
        assert same(part, {name: value[rows] for name, value in whole.items()})


def test_an_epoch_holds_every_image_once(make_split):
    split = make_split(23)
    assert steps_per_epoch(split, batch_size=5) == 23 / 5
    stored = {image.tobytes() for image in split.read(np.arange(23))[0]}
    # 23 batches of 5 are five epochs of 23 images.
    rows = np.concatenate(
        [
            batch(split, seed=0, step=s, batch_size=5, augment=Augment())["image"]
            for s in range(23)
        ]
    )
    pixels = np.rint((rows * 0.5 + 0.5) * 255).astype(np.uint8)
    orders = []
    for epoch in pixels.reshape(5, 23, *pixels.shape[1:]):
        orders.append([image.tobytes() for image in epoch])
        assert set(orders[-1]) == stored
    assert orders[0] != orders[1]


def test_pixels_are_normalised_channel_by_channel(make_split):
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    split = make_split(channels=3, mean=mean, std=std)
    (got,) = eval_batches(split, batch_size=23)
    pixels = np.asarray(split.reader.images, np.float64) / 255
    np.testing.assert_allclose(got["image"], (pixels - mean) / std, rtol=0, atol=1e-6)


def test_mixup_is_the_mixture_that_its_arrays_tell(make_split):
    split = make_split()
    fixed = {"seed": 2, "step": 3, "batch_size": 9}
    plain = batch(split, **fixed, augment=Augment())
    mixed = batch(split, **fixed, augment=Augment(mixup=0.7))
    assert (plain["mix"] == 1).all()
    assert np.array_equal(plain["other_label"], plain["label"])
    share = mixed["mix"][:, None, None, None]
    before = np.roll(plain["image"], 1, axis=0)
    expected = share * plain["image"] + (1 - share) * before
    np.testing.assert_allclose(mixed["image"], expected, rtol=0, atol=1e-6)
    assert np.array_equal(mixed["label"], plain["label"])
    assert np.array_equal(mixed["other_label"], np.roll(plain["label"], 1))
    assert (mixed["mix"] >= 0.5).all() and len(set(mixed["mix"])) == 9


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_mixups_share_is_a_folded_beta_variable(alpha):
    draws = np.random.default_rng(0).random(4000)
    share = mixup_share(draws, alpha)

    def below(x):
        return stats.beta.cdf(x, alpha, alpha) - stats.beta.cdf(1 - x, alpha, alpha)

    assert stats.kstest(share, below).pvalue > 0.01
    assert stats.kstest(share, "uniform", (0.5, 0.5)).pvalue > 0.01 or alpha != 1.0


def test_one_augmentation_does_not_move_another(make_split):
    split, fixed = make_split(), {"seed": 2, "step": 3, "batch_size": 9}
    one = batch(split, **fixed, augment=Augment(mixup=0.7))
    both = batch(split, **fixed, augment=Augment(mixup=0.7, flip=True, crop="pad"))
    assert np.array_equal(one["mix"], both["mix"])


def test_what_is_random_about_an_image_is_independent(make_split):
    split, fixed = make_split(500), {"seed": 2, "step": 3, "batch_size": 400}
    plain = batch(split, **fixed, augment=Augment())["image"]
    flipped = batch(split, **fixed, augment=Augment(flip=True))["image"]
    mirrored = (flipped != plain).any(axis=(1, 2, 3))
    assert np.array_equal(flipped[mirrored], plain[mirrored][:, :, ::-1])
    assert 160 < mirrored.sum() < 240
    moved = batch(split, **fixed, augment=Augment(crop="pad", pad=1))["image"]
    left = np.array(
        [
            np.array_equal(m[1:-1, :-1], p[1:-1, 1:])
            for m, p in zip(moved, plain, strict=True)
        ]
    )
    share = batch(split, **fixed, augment=Augment(mixup=1.0))["mix"]
    for one, other in (
        (mirrored, share > 0.75),
        (mirrored, left),
        (left, share > 0.75),
    ):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.15


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_evaluation_shows_every_image_once(make_split, batch_size):
    split = make_split(name="eval")
    got = list(eval_batches(split, batch_size=batch_size))
    assert len(got) == num_eval_batches(split, batch_size=batch_size)
    assert {b["image"].shape for b in got} == {(batch_size, 6, 6, 1)}
    rows = {name: np.concatenate([b[name] for b in got]) for name in got[0]}
    assert rows["weight"].sum() == 23 and (rows["weight"][:23] == 1).all()
    assert np.array_equal(rows["label"][:23], split.reader.labels)
    assert not rows["image"][23:].any() and not rows["label"][23:].any()
    assert (rows["mix"] == 1).all()


@pytest.mark.parametrize("corruption", [None, "gaussian_noise"])
def test_hosts_together_hold_the_evaluation(make_split, corruption):
    split, severity = make_split(), 3 if corruption else 0
    shift = {"corruption": corruption, "severity": severity}
    whole = list(eval_batches(split, batch_size=6, **shift))
    halves = [
        eval_batches(split, batch_size=6, rows=rows, **shift)
        for rows in (slice(0, 3), slice(3, 6))
    ]
    for all_rows, first, second in zip(whole, *halves, strict=True):
        joined = {n: np.concatenate([first[n], second[n]]) for n in all_rows}
        assert same(all_rows, joined)


def test_a_corruption_does_not_depend_on_the_batch_size(make_split):
    split, shift = make_split(), {"corruption": "gaussian_noise", "severity": 2}
    one, many = (
        np.concatenate([b["image"] for b in eval_batches(split, batch_size=n, **shift)])
        for n in (1, 9)
    )
    assert np.array_equal(one, many[:23])


def test_what_is_kept_in_memory_changes_no_batch(make_split, monkeypatch):
    fixed = {"seed": 3, "step": 8, "batch_size": 6, "augment": Augment(mixup=0.2)}
    kept = batch(make_split(image_size=9), **fixed)
    monkeypatch.setattr(corpus, "MOST_KEPT", 23 * 81 - 1)
    split = make_split(image_size=9)
    assert same(batch(split, **fixed), kept)
    assert not split._is_kept and make_split(image_size=8)._is_kept


def test_a_label_that_is_no_class_is_refused(make_split):
    made = make_split()
    split = ImageSplit(made.reader, 23, 4, made.config, "eval")
    message = r"labels must be in \[0, number of classes\); got label=4 in the eval "
    with pytest.raises(UserError, match=message):
        batch(split, seed=0, step=0, batch_size=23, augment=Augment())

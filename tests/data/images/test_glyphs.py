import numpy as np
import pytest

from attnjax.core.errors import UserError
from attnjax.data.images import Augment, batch, num_classes, open_corpus
from attnjax.data.images.fonts import FONTS, mask
from attnjax.data.images.glyphs import Config, place


def opened(**options):
    return open_corpus(Config(**{"image_size": 12, "num_eval": 40, **options}))


def ask(corpus, seed=0, step=0, size=24):
    return batch(corpus.train, seed=seed, step=step, batch_size=size, augment=Augment())


def ink(image):
    """Where an image is nearer to its brightest pixel than to its darkest."""
    return image > (image.min() / 2 + image.max() / 2)


def test_an_image_is_a_function_of_the_seed_and_its_number():
    corpus = opened()
    one, other = corpus.train.read(np.arange(30)), opened().train.read(np.arange(30))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    far = 2**47 + 5
    images, labels, _ = corpus.train.read(np.array([far, 7, 3]))
    assert np.array_equal(images[1:], one[0][[7, 3]])
    assert labels[1:].tolist() == one[1][[7, 3]].tolist()
    assert not np.array_equal(opened(seed=1).train.read(np.arange(30))[0], one[0])


def test_images_do_not_repeat():
    corpus = opened()
    rows = [corpus.train.read(np.arange(200))[0], corpus.eval.read(np.arange(40))[0]]
    rows += [b["image"] for b in (ask(corpus), ask(corpus, step=1), ask(corpus, 1))]
    assert len({image.tobytes() for part in rows for image in part}) == 240 + 72


@pytest.mark.parametrize(("side", "channels"), [(7, 1), (12, 3), (33, 1)])
def test_images_have_any_size(side, channels):
    corpus = opened(image_size=side, channels=channels)
    images, labels, readable = corpus.train.read(np.arange(20))
    assert images.shape == (20, side, side, channels) and images.dtype == np.uint8
    assert readable.all() and labels.dtype == np.int32
    assert corpus.describe().startswith("glyphs: endless images to train on, 40 held")


def test_classes_are_drawn_alike_and_named():
    corpus = opened(chars="xyz")
    assert corpus.class_names == ("x", "y", "z") and num_classes(Config()) == 10
    labels = corpus.train.read(np.arange(900))[1]
    assert np.abs(np.bincount(labels, minlength=3) - 300).max() < 60


def test_the_class_decides_the_character_and_nothing_else():
    reader = opened(chars="0|", rotation=0.0, shift=0.0, image_size=20).train.reader
    draws = reader.draws(np.arange(25))
    zeros, bars = ([reader.image(c, row) for row in draws] for c in (0, 1))
    widths = [
        [np.ptp(np.flatnonzero(ink(i).any(axis=(0, 2)))) + 1 for i in images]
        for images in (zeros, bars)
    ]
    assert min(widths[0]) > max(widths[1])
    # Paper and ink have the same grey levels: extremes differ by interpolation alone.
    for zero, bar in zip(zeros, bars, strict=True):
        assert abs(int(zero.min()) - int(bar.min())) <= 1


def test_fonts_sizes_and_places_vary():
    reader = opened(chars="48", rotation=0.0, image_size=24).train.reader
    images = [reader.image(0, row) for row in reader.draws(np.arange(60))]
    boxes = set()
    for image in images:
        rows, columns = (
            np.flatnonzero(ink(image).any(axis=a)) for a in ((1, 2), (0, 2))
        )
        boxes.add((rows[0], rows[-1], columns[0], columns[-1]))
    heights = {box[1] - box[0] for box in boxes}
    assert len(boxes) > 30 and max(heights) - min(heights) >= 4


def test_grey_levels_keep_ink_and_paper_apart():
    images, _, _ = opened(image_size=24).train.read(np.arange(100))
    low, high = (f(images, axis=(1, 2, 3)) for f in (np.min, np.max))
    assert (low <= 0.4 * 255 + 1).all() and (high >= 0.5 * 255).all()
    assert len(set(low.tolist())) > 20


def test_a_mask_is_turned_about_its_middle():
    square = np.full((6, 6), 255, np.uint8)
    still = place(square, 16, degrees=0.0, shift=(0, 0))
    assert np.array_equal(still[5:11, 5:11], square) and still.sum() == square.sum()
    moved = place(square, 16, degrees=0.0, shift=(2, -3))
    assert np.array_equal(moved, np.roll(still, (-3, 2), axis=(0, 1)))
    bar = np.zeros((9, 9), np.uint8)
    bar[:, 4] = 255
    quarter = place(bar, 16, degrees=90.0, shift=(0.5, 0.5))
    upright = place(bar, 16, degrees=0.0, shift=(0.5, 0.5))
    np.testing.assert_allclose(quarter, upright.T, atol=2)


def test_a_turn_is_counterclockwise():
    corner = np.zeros((7, 7), np.uint8)
    corner[:2, 5:] = 255  # right above; a quarter turn brings it left above
    turned = place(corner, 7 * 2, degrees=90.0, shift=(0, 0)).astype(float)
    rows, columns = (np.arange(14) @ turned.sum(axis=a) / turned.sum() for a in (1, 0))
    assert rows < 6 and columns < 6


def test_a_mask_larger_than_the_image_is_reduced():
    wide = np.full((4, 40), 255, np.uint8)
    placed = place(wide, 10, degrees=0.0, shift=(0, 0))
    columns = np.flatnonzero(placed.any(axis=0))
    assert 8 <= len(columns) <= 10 and placed.any(axis=1).sum() <= 3


def test_every_font_has_every_digit_and_draws_it_differently():
    drawn = {font: mask(font, "5", 24) for font in FONTS}
    assert all(ink.max() > 200 for ink in drawn.values())
    assert len({ink.tobytes() for ink in drawn.values()}) == len(FONTS)


def test_a_font_without_a_character_is_not_used_for_it():
    # What TeX's roman has at the place of "|" is a dash.
    height, width = mask("cmr10", "|", 24).shape
    assert width > height and "cmr10" not in opened(chars="a|").train.reader.usable[1]
    assert mask("cmr10", "ß", 24).size == 0 and mask("DejaVuSans", "ß", 24).any()
    corpus = opened(chars="aß")
    assert "cmr10" in corpus.train.reader.usable[0]
    assert "cmr10" not in corpus.train.reader.usable[1]


def test_a_finite_set_is_an_epoch_long():
    corpus = opened(num_train=30)
    assert corpus.train.num_images == 30 and corpus.train.reader.is_stored
    stored = {image.tobytes() for image in corpus.train.read(np.arange(30))[0]}
    seen = np.rint((ask(corpus, size=30)["image"] * 0.5 + 0.5) * 255).astype(np.uint8)
    assert {image.tobytes() for image in seen} == stored


def test_the_fingerprint_knows_what_is_drawn_and_not_its_size():
    same = {opened().fingerprint, opened(image_size=9, channels=3).fingerprint}
    others = [{"seed": 1}, {"chars": "01"}, {"fonts": ("cmr10",)}, {"rotation": 3.0}]
    assert len(same) == 1
    assert len(same | {opened(**o).fingerprint for o in others}) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chars": "1"}, "at least two different characters; got chars='1'"),
        ({"chars": "0120"}, "two different characters; got chars='0120'"),
        ({"chars": "a b"}, r"must be in one of the fonts; got ' ' \(U\+0020\), in no"),
        ({"chars": "a一"}, r"got '一' \(U\+4E00\), in none of 21"),
        ({"fonts": ("cmr1",)}, r"unknown font 'cmr1'\. Did you mean cmr10"),
        ({"num_train": 0}, "num_train must be at least 1; got num_train=0"),
        ({"num_eval": 0}, "num_eval must be at least 1"),
        ({"font_size": (1.0, 0.5)}, "font_size must be two rising shares"),
        (
            {"rotation": 200.0},
            r"rotation must be in \[0, 180\] degrees; got rotation=2",
        ),
        ({"shift": -0.1}, r"shift must be in \[0, 1\]; got shift=-0\.1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        opened(**options)


def test_a_font_that_cannot_be_opened_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("matplotlib.get_data_path", lambda: str(tmp_path))
    with pytest.raises(
        UserError, match=r"needs Pillow with FreeType .* for cmtt10\. Run"
    ):
        mask("cmtt10", "A", 1234)

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from attnjax.core.errors import UserError
from attnjax.data.images import Augment, batch, eval_batches, folder, open_corpus
from attnjax.data.images.folder import Config

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)


def write(root, name, shade=0):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(PIXELS // 2 + np.uint8(shade)).save(path)
    return path


@pytest.fixture
def root(tmp_path):
    """Two classes of ten images, without splits."""
    for index in range(10):
        write(tmp_path / "pets", f"cat/{index}.png", index)
        write(tmp_path / "pets", f"dog/deep/{index}.JPG", 100 + index)
    return tmp_path / "pets"


def split(root):
    """The same in folders train and val."""
    for name in ("cat", "dog"):
        (root / "train").mkdir(exist_ok=True)
        shutil.move(root / name, root / "train" / name)
        write(root, f"val/{name}/held.png", 3)


def opened(root, **options):
    return open_corpus(Config(name=f"folder:{root}", image_size=5, **options))


def names(corpus):
    return [[f.name for f in s.reader.files] for s in (corpus.train, corpus.eval)]


def test_class_folders_are_read_and_a_share_is_held_out(root):
    corpus = opened(root, eval_fraction=0.2)
    assert corpus.class_names == ("cat", "dog")
    train, held_out = names(corpus)
    assert len(train) == 16 and len(held_out) == 4
    assert not set(train) & set(held_out) and sorted(train) == train
    assert [name.split("/")[0] for name in held_out] == ["cat", "cat", "dog", "dog"]
    assert "16 images to train on, 4 held out, 5x5x3, 2 classes" in corpus.describe()


def test_the_choice_of_what_is_held_out_does_not_depend_on_the_place(root, tmp_path):
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)
    first, second = opened(root), opened(tmp_path / "copy")
    assert names(first) == names(second)
    assert first.fingerprint == second.fingerprint
    assert names(opened(root, eval_fraction=0.3)) != names(first)


def test_a_class_of_one_image_keeps_it_for_training(root):
    write(root, "owl/only.png")
    corpus = opened(root)
    assert ("owl/only.png" in names(corpus)[0], corpus.num_classes) == (True, 3)


def test_folders_train_and_val_are_the_splits(root):
    split(root)
    corpus = opened(root)
    assert corpus.class_names == ("cat", "dog")
    assert names(corpus)[1] == ["val/cat/held.png", "val/dog/held.png"]
    assert corpus.train.num_images == 20
    os.rename(root / "val", root / "shifted")
    assert names(opened(root, eval_split="shifted"))[1][0] == "shifted/cat/held.png"
    with pytest.raises(UserError, match=r"eval_split 'shfted'\. Did you mean shifted"):
        opened(root, eval_split="shfted")
    # Without a folder that is held out, a share of train is.
    assert len(names(opened(root))[1]) == 2


def test_a_held_out_folder_may_stand_beside_the_classes(root):
    write(root, "mine/cat/x.png")
    corpus = opened(root, eval_split="mine")
    assert (corpus.class_names, names(corpus)[1]) == (
        ("cat", "dog"),
        ["mine/cat/x.png"],
    )


def test_the_fingerprint_is_of_names_sizes_and_classes(root):
    before = opened(root).fingerprint
    os.utime(root / "cat/0.png")
    assert opened(root).fingerprint == before
    os.rename(root / "cat/0.png", root / "cat/0b.png")
    renamed = opened(root).fingerprint
    with open(root / "cat/0b.png", "ab") as file:
        file.write(b"\0")
    assert len({before, renamed, opened(root).fingerprint}) == 3


def test_pixels_and_labels_are_those_of_the_files(root):
    corpus = opened(root, mean=(0.0,), std=(1.0,))
    (got,) = eval_batches(corpus.eval, batch_size=2)
    assert got["label"].tolist() == [0, 1]
    stored = Image.open(root / names(corpus)[1][0])
    middle = stored.resize((5, 5), Image.Resampling.BILINEAR, box=(0, 1, 7, 8))
    assert np.array_equal(got["image"][0], np.float32(middle) / np.float32(255))


def test_hosts_together_hold_the_global_batch(root):
    augment = Augment(crop="inception", flip=True, randaugment_layers=1, mixup=0.5)
    fixed = {"seed": 1, "step": 2, "batch_size": 6, "augment": augment}
    whole = batch(opened(root).train, **fixed)
    halves = [
        batch(opened(root).train, **fixed, rows=rows)
        for rows in (slice(0, 3), slice(3, 6))
    ]
    for name, value in whole.items():
        assert np.array_equal(value, np.concatenate([h[name] for h in halves]))


def broken(root):
    good = (root / "cat/0.png").read_bytes()
    (root / "cat/cut.png").write_bytes(good[:90])
    (root / "dog/text.jpg").write_text("not an image")
    (root / "dog/empty.webp").write_bytes(b"")
    return ["cat/cut.png", "dog/empty.webp", "dog/text.jpg"]


def test_damaged_files_are_named_counted_and_left_out(root, capsys):
    bad = broken(root)
    corpus = opened(root)
    said = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(said) == 1
    assert said[0].startswith("folder: left out 3 of 23 images that cannot be decoded:")
    assert all(name in said[0] for name in bad)
    assert corpus.provenance["unreadable"] == bad
    assert corpus.provenance["num_unreadable"] == 3
    assert not set(bad) & {n for part in names(corpus) for n in part}
    got = batch(corpus.train, seed=0, step=0, batch_size=18, augment=Augment())
    assert (got["weight"] == 1).all()


def test_files_are_decoded_once_and_again_when_they_change(root, capsys, monkeypatch):
    broken(root)
    opened(root)
    calls = []
    real = folder.decode_file
    monkeypatch.setattr(
        folder, "decode_file", lambda path, ch: calls.append(path) or real(path, ch)
    )
    capsys.readouterr()
    assert opened(root).provenance["num_unreadable"] == 3
    assert not calls and "left out 3 of 23" in capsys.readouterr().err
    shutil.copy(root / "cat/1.png", root / "cat/cut.png")
    assert opened(root).provenance["num_unreadable"] == 2
    assert len(calls) == 23


def test_a_file_that_cannot_be_read_is_tried_again_next_time(root, monkeypatch):
    real = folder.decode_file

    def flaky(path, channels):
        if path.name == "3.png":
            raise folder.Unreachable("Input/output error")
        return real(path, channels)

    with monkeypatch.context() as patch:
        patch.setattr(folder, "decode_file", flaky)
        assert opened(root).provenance["unreadable"] == ["cat/3.png"]
    assert opened(root).provenance["unreadable"] == []


def test_a_file_that_breaks_later_has_weight_zero_and_harms_no_other(root, capsys):
    augment, clean = Augment(mixup=0.5), opened(root)
    fixed = {"seed": 1, "step": 0, "batch_size": 18}
    before = batch(clean.train, **fixed, augment=augment)
    bad = broken(root)
    corpus = opened(root)
    assert clean.train.num_images == corpus.train.num_images == 18
    capsys.readouterr()
    gone = [f.name for f in corpus.train.reader.files].index("cat/1.png")
    (root / "cat/1.png").write_bytes((root / bad[0]).read_bytes())
    after = batch(corpus.train, **fixed, augment=augment)
    plain = batch(corpus.train, **fixed, augment=Augment())
    (place,) = np.flatnonzero(after["weight"] == 0)
    follower = (place + 1) % 18
    assert after["mix"][follower] == 1
    assert after["other_label"][follower] == after["label"][follower]
    assert np.array_equal(after["image"][follower], plain["image"][follower])
    others = [row for row in range(18) if row not in (place, follower)]
    assert np.array_equal(after["image"][others], before["image"][others])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("folder: cannot decode cat/1.png (") and "weight 0" in line
    assert corpus.unreadable.keys() == {"cat/1.png"} and not clean.unreadable
    assert not corpus.train.read(np.array([gone]))[0].any()


def test_the_check_can_be_left_out(root, capsys, cache_dir):
    broken(root)
    corpus = opened(root, verify=False)
    assert corpus.train.num_images + corpus.eval.num_images == 23
    rows = [*eval_batches(corpus.eval, batch_size=23)]
    rows += [batch(corpus.train, seed=0, step=0, batch_size=21, augment=Augment())]
    assert not cache_dir.exists()
    assert sum(row["weight"].sum() for row in rows) == pytest.approx(20, abs=2)
    assert capsys.readouterr().err.count("cannot decode") == 1


def test_many_damaged_files_are_counted_in_few_lines(capsys):
    damage = folder.Damage("folder")
    for index in range(120):
        damage.note(f"{index}.png", "why")
        damage.note("0.png", "why")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].split()[0] for line in lines] == ["cannot", "10", "100"]
    assert len(damage.unreadable) == 120


def test_a_folder_without_a_readable_image_is_refused(root):
    for path in root.rglob("*.*"):
        path.write_bytes(b"no")
    message = r"at least one image must be readable; got 20 .* such as cat/0\.png \(no "
    with pytest.raises(UserError, match=message):
        opened(root)


def test_a_folder_without_images_is_refused(root):
    for path in root.rglob("*.*"):
        path.rename(path.with_suffix(".txt"))
    message = r"there must be images to be trained on; got none in .*pets\. Known kinds"
    with pytest.raises(UserError, match=message):
        opened(root)


def test_a_split_whose_images_are_all_damaged_is_refused(root):
    split(root)
    for path in (root / "val").rglob("*.png"):
        path.write_bytes(b"no")
    with pytest.raises(UserError, match="must have an image; got none in the eval spl"):
        opened(root)


def test_a_missing_folder_names_the_nearest(root, tmp_path):
    message = r"PATH must be a folder; got .* has no folder 'pet'\. Did you mean pets\?"
    with pytest.raises(UserError, match=message):
        open_corpus(Config(name="folder:pet/inner", data_dir=str(tmp_path)))
    with pytest.raises(
        UserError, match=r"must be a folder of class folders; got the fi"
    ):
        opened(root / "cat" / "0.png")


def test_a_relative_path_starts_from_data_dir(root, tmp_path):
    corpus = open_corpus(Config(name="folder:pets", data_dir=str(tmp_path)))
    assert corpus.num_classes == 2 and corpus.provenance["source"] == "folder:pets"


def test_a_single_class_is_refused(root):
    shutil.rmtree(root / "dog")
    (root / ".hidden").mkdir()
    with pytest.raises(UserError, match="at least two classes, a folder each; got 1"):
        opened(root)


def test_a_class_that_is_only_held_out_is_refused(root):
    split(root)
    write(root, "val/dgo/x.png")
    message = r"unknown class 'dgo'\. Did you mean dog\? .* It is in .*val and not in"
    with pytest.raises(UserError, match=message):
        opened(root)


def test_a_link_to_a_folder_is_followed(root, tmp_path):
    write(tmp_path, "elsewhere/more/x.png")
    before = opened(root).provenance["num_files"]
    os.symlink(tmp_path / "elsewhere", root / "cat" / "linked")
    assert opened(root).provenance["num_files"] == before + 1


def test_a_link_in_a_circle_ends(root):
    os.symlink(root, root / "cat" / "loop")
    os.symlink(root / "nowhere.png", root / "cat" / "dangling.png")
    corpus = opened(root)
    assert corpus.provenance["unreadable"] == ["cat/dangling.png"]

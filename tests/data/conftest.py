"""Small splits, and a cache of the test's own."""

import numpy as np
import pytest

from attnjax.data import Split


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    """No test reads or fills the user's cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("ATTNJAX_CACHE", str(folder))
    return folder


@pytest.fixture
def make_split():
    """Builds a split from document lengths, with ids that tell where they stand."""

    def make(*lengths, separator=None, dtype=np.uint16, name="train"):
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = (np.arange(offsets[-1]) * 7 + 3) % 251
        return Split(
            tokens=tokens.astype(dtype),
            document_offsets=offsets,
            separator=separator,
            name=name,
        )

    return make


@pytest.fixture
def write_data_set():
    """Writes an array_record data set through TFDS, without TensorFlow."""
    return _write_data_set


def _write_data_set(folder, name, features, splits):
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module
    from tensorflow_datasets.core import example_serializer

    folder = folder / name / "1.0.0"
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict(features)
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    infos = []
    for split, examples in splits.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder,
            dataset_name=name,
            split=split,
            filetype_suffix="array_record",
        )
        path = str(folder / f"{name}-{split}.array_record-00000-of-00001")
        writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
        for example in examples:
            encoded = features.encode_example(example)
            writer.write(serializer.serialize_example(encoded))
        writer.close()
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(examples)],
                num_bytes=1,
                filename_template=template,
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=str(folder), features=features, split_infos=infos, check_data=False
    )
    return folder

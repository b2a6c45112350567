import numpy as np
import pytest

from attnjax.core.errors import UserError
from attnjax.data.shards import Chain, chain, open_shard


def write_llmc(path, ids, *, magic=20240520, version=1, count=None, dtype="<u2"):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(ids, dtype).tobytes())
    return path


def test_raw_ids_are_mapped(tmp_path):
    path = tmp_path / "train.bin"
    np.array([5, 50256, 1], "<u2").tofile(path)
    shard = open_shard(path)
    assert shard.ids.tolist() == [5, 50256, 1] and not shard.has_header


@pytest.mark.parametrize(
    ("magic", "version", "dtype", "ids"),
    [(20240520, 1, "<u2", [3, 65535, 9]), (20240801, 7, "<u4", [128000, 1])],
)
def test_llmc_files_are_mapped_by_their_header(tmp_path, magic, version, dtype, ids):
    path = tmp_path / "a.bin"
    write_llmc(path, ids, magic=magic, version=version, dtype=dtype)
    shard = open_shard(path)
    assert shard.ids.tolist() == ids and shard.has_header


def test_a_single_raw_id_is_a_file(tmp_path):
    np.array([7], "<u2").tofile(tmp_path / "a.bin")
    assert open_shard(tmp_path / "a.bin").ids.tolist() == [7]


@pytest.mark.parametrize("size", [0, 3])
def test_a_raw_file_that_is_not_whole_is_refused(tmp_path, size):
    (tmp_path / "a.bin").write_bytes(b"\x01" * size)
    with pytest.raises(UserError, match=rf"must be whole uint16 ids; .* of {size}"):
        open_shard(tmp_path / "a.bin")


def test_another_version_is_refused(tmp_path):
    path = write_llmc(tmp_path / "a.bin", [1, 2], version=2)
    with pytest.raises(UserError, match="magic 20240520 version 2"):
        open_shard(path)


@pytest.mark.parametrize("count", [0, 3, 5])
def test_a_file_that_disagrees_with_its_header_is_refused(tmp_path, count):
    path = write_llmc(tmp_path / "a.bin", [1, 2, 3, 4], count=count)
    with pytest.raises(UserError, match="must hold the ids its header counts"):
        open_shard(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UserError, match="must be readable; got .*No such file"):
        open_shard(tmp_path / "a.bin")


@pytest.fixture
def parts():
    return [np.arange(begin, end) for begin, end in ((0, 5), (5, 6), (6, 13))]


def test_a_chain_is_indexed_like_one_array(parts):
    whole, chained = np.arange(13), Chain(parts)
    assert len(chained) == 13 and chained.dtype == whole.dtype
    for index in (
        np.array([[12, 0, 5], [4, 6, 4]]),
        np.array([3]),
        np.zeros(0, int),
        slice(2, 9),
        slice(11, 99),
        slice(None),
        slice(5, 5),
    ):
        assert chained[index].tolist() == whole[index].tolist()


def test_one_array_needs_no_chain(parts):
    assert chain(parts[:1]) is parts[0]
    assert isinstance(chain(parts), Chain)

import pytest

from data_pipelines.build import build
from data_pipelines.records import RecordsError, find_shards
from data_pipelines.sources.phantoms import Phantoms
from data_pipelines.verify import main, verify


@pytest.fixture
def records(tmp_path):
    build(Phantoms(4, size=64), tmp_path / "records", name="phantoms", num_shards=2, progress=False)
    return tmp_path / "records"


def test_untouched_records_are_verified(records, capsys):
    assert main([str(records)]) == 0
    assert "2 shards are as they were built" in capsys.readouterr().out


def test_one_changed_byte_is_found_and_its_shard_named(records, capsys):
    shard = find_shards(records).shards[1]
    with open(shard, "r+b") as file:
        file.seek(100)
        byte = file.read(1)[0]
        file.seek(100)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(RecordsError, match="1 of 2 shards changed") as error:
        verify(records)
    assert shard in str(error.value)
    assert main([str(records)]) == 1
    assert "Traceback" not in capsys.readouterr().err

import json
import logging
import pickle
import threading

import pytest

from data_pipelines.quarantine import Quarantine
from data_pipelines.records import Records, RecordsError

RECORDS = Records("/data/chests", "train", "array_record", ("/data/chests/c-0", "/data/chests/c-1"), (3, 5), {})
ERROR = ValueError("broken")


def entries(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_record_is_listed_by_shard_and_place_once(tmp_path, caplog):
    quarantine = Quarantine(tmp_path / "q.jsonl", limit=5)
    assert quarantine.count() == 0 and not quarantine.path.exists()
    with caplog.at_level(logging.WARNING):
        for index in (4, 0, 4):
            quarantine.add(RECORDS, index, ERROR, "patient 7")
    assert entries(quarantine.path) == [
        {"records": "chests", "shard": "c-1", "record": 1, "reason": "broken"},
        {"records": "chests", "shard": "c-0", "record": 0, "reason": "broken"},
    ]
    assert quarantine.count() == 2
    assert [record.getMessage() for record in caplog.records] == [
        "skipped a corrupt record: /data/chests/c-1, record 1, image 'patient 7': broken",
        "skipped a corrupt record: /data/chests/c-0, record 0, image 'patient 7': broken",
    ]


def test_list_has_no_image_ids_captions_or_folders(tmp_path):
    quarantine = Quarantine(tmp_path / "q.jsonl", limit=9)
    caption = "seen on Monday: Mr. Doe's left lung, and more of it"
    for index, message in enumerate(
        [
            "/data/chests/c-0, record 0: damaged (/data/chests/c-0: bad)",
            f"spans are not inside the caption {caption!r}",
            "image 'id 5' is odd",
        ]
    ):
        quarantine.add(RECORDS, index, RecordsError(message), "id 5")
    assert [entry["reason"] for entry in entries(quarantine.path)] == [
        "damaged (c-0: bad)",
        "spans are not inside the caption '...'",
        "image '...' is odd",
    ]


def test_limit_holds_over_restarts_processes_and_copies(tmp_path):
    path = tmp_path / "q.jsonl"
    Quarantine(path, 3).add(RECORDS, 0, ERROR)
    Quarantine(path, 3, process_index=1).add(RECORDS, 1, ERROR)
    first = Quarantine(path, 3)
    pickle.loads(pickle.dumps(first)).add(RECORDS, 2, ERROR)
    first.add(RECORDS, 1, ERROR)
    assert first.count() == 3
    assert sorted(file.name for file in tmp_path.iterdir()) == ["q-1.jsonl", "q.jsonl"]
    with pytest.raises(
        RecordsError, match=r"c-1, record 0: broken\n4 records.*max_corrupt is 3: .*q\.jsonl lists them"
    ):
        first.add(RECORDS, 3, ERROR)
    with pytest.raises(RecordsError, match="4 records"):  # a known one too: the run must not go on
        Quarantine(path, 3).add(RECORDS, 0, ERROR)


def test_other_files_beside_it_do_not_count(tmp_path):
    (tmp_path / "q-old.jsonl").write_text('{"records": "a", "shard": "b", "record": 9}\n')
    (tmp_path / "q-2.jsonl").write_text('{"records": "a", "shard": "b", "record": 1}\n{"records": "a", "sha')
    assert Quarantine(tmp_path / "q.jsonl", 1).count() == 1


def test_without_a_file_records_are_counted_in_memory():
    quarantine = Quarantine(None, 1)
    quarantine.add(RECORDS, 0, ERROR)
    quarantine.add(RECORDS, 0, ERROR)
    assert quarantine.count() == 1
    with pytest.raises(RecordsError, match=r"2 records cannot be used .*the log names them"):
        quarantine.add(RECORDS, 1, ERROR)


def test_threads_list_a_record_once(tmp_path):
    quarantine = Quarantine(tmp_path / "q.jsonl", limit=9)
    threads = [threading.Thread(target=quarantine.add, args=(RECORDS, index % 4, ERROR)) for index in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(entries(quarantine.path)) == 4


def test_negative_limit_is_an_error():
    with pytest.raises(ValueError, match=r"config\.data\.max_corrupt is -1"):
        Quarantine(None, -1)

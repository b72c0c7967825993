"""Files of a run, on this machine and in what looks like a bucket."""

import json
import pathlib

import pytest
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from configs.medglip_t import get_config
from data_pipelines.text import load_tokenizer
from medglip_jax.configuration import load_config, save_config
from medglip_jax.evaluation.report import write_json
from medglip_jax.paths import append_line, copy_folder, drop_later_lines, full_path, is_remote, local_copy, local_output
from medglip_jax.pretrained import tokenizer_of
from medglip_jax.training.checkpoint import locate
from medglip_jax.training.goodput import Goodput
from medglip_jax.training.logging import MetricsLog
from medglip_jax.training.nonfinite import NonFiniteSteps
from medglip_jax.training.status import Status


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A bucket gs://bucket whose objects are files in a folder; returns both."""

    class Bucket(DirFileSystem):
        @classmethod
        def _strip_protocol(cls, path):
            return str(path).removeprefix("gs://")

    system = Bucket(path=str(tmp_path), fs=LocalFileSystem(auto_mkdir=True))
    monkeypatch.setattr(backend._FileSystemSpecBackend, "fs", lambda self, path: system)
    return "gs://bucket/runs/one", tmp_path / "bucket" / "runs" / "one"


def test_local_paths_become_whole_and_buckets_stay(monkeypatch, tmp_path, bucket):
    monkeypatch.chdir(tmp_path)
    assert full_path("runs/../one") == tmp_path / "one"
    assert str(full_path("gs://bucket/one")) == "gs://bucket/one"
    assert is_remote("gs://bucket/one") and is_remote("s3://b") and not is_remote("/gs/one")
    assert locate("gs://bucket/one/checkpoints/12") == (full_path("gs://bucket/one"), 12)


def test_files_of_a_run_lie_in_a_bucket(bucket, tmp_path):
    remote, local = bucket
    config = get_config()
    save_config(config, f"{remote}/config.json")
    assert load_config(remote) == load_config(local) == config.lock()
    write_json({"AP": 0.5}, f"{remote}/evaluation.json")
    assert json.loads((local / "evaluation.json").read_text()) == {"AP": 0.5}
    goodput = Goodput(remote)
    goodput.begin_steps(0)
    goodput.write(3)
    assert json.loads((local / "goodput.json").read_text())["starts"][0]["last_step"] == 3
    assert Goodput(remote).report()["starts"][0]["last_step"] == 3
    status = Status(remote)
    with status.follow():
        assert json.loads((local / "status.json").read_text())["status"] == "running"
    assert json.loads((local / "status.json").read_text())["status"] == "finished"


def test_lines_are_added_and_dropped(bucket, tmp_path):
    for path in (f"{bucket[0]}/lines.jsonl", tmp_path / "lines.jsonl"):
        full_path(path).parent.mkdir(parents=True, exist_ok=True)
        for step in (1, 2, 3):
            append_line(path, json.dumps({"step": step}))
        full_path(path).write_text(full_path(path).read_text() + '{"step"')
        assert drop_later_lines(path, 2) == 2
        append_line(path, "end")
        assert full_path(path).read_text() == '{"step": 1}\n{"step": 2}\nend\n'


def test_a_tokenizer_is_read_from_a_bucket(bucket):
    remote, local = bucket
    tokenizer = load_tokenizer("")
    with local_output(f"{remote}/tokenizer") as folder:
        tokenizer.save(folder)
    assert sorted(path.name for path in (local / "tokenizer").iterdir())[0] == "tokenizer.json"
    config = get_config()
    save_config(config, f"{remote}/config.json")
    assert tokenizer_of(remote, config).vocab_size == tokenizer.vocab_size


def test_folders_and_files_are_copied_both_ways(bucket, tmp_path):
    remote, local = bucket
    (tmp_path / "trace" / "a").mkdir(parents=True)
    (tmp_path / "trace" / "a" / "x.bin").write_bytes(b"\0\1")
    copy_folder(tmp_path / "trace", f"{remote}/profile")
    assert (local / "profile" / "a" / "x.bin").read_bytes() == b"\0\1"
    with local_copy(f"{remote}/profile") as folder:
        assert (pathlib.Path(folder) / "a" / "x.bin").read_bytes() == b"\0\1"
    with local_copy(tmp_path) as folder:
        assert folder == str(tmp_path)
    with local_output(f"{remote}/sheet.png") as file:
        pathlib.Path(file).write_bytes(b"png")
    assert (local / "sheet.png").read_bytes() == b"png"
    with local_output(f"{remote}/other.png"):
        pass  # only the first process draws
    assert not (local / "other.png").exists()


def test_a_bucket_that_cannot_be_read_says_what_to_install(monkeypatch):
    from etils import epath

    def missing(self):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(type(epath.Path("gs://b")), "exists", missing)
    with pytest.raises(ValueError, match="gs://b/run: Please install gcsfs; for buckets install gcsfs"):
        full_path("gs://b/run")


def test_metrics_in_a_bucket_go_on(bucket, monkeypatch):
    remote, local = bucket
    local.mkdir(parents=True)
    (local / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 9, "loss": 2.0}\n')
    import tensorboardX

    class Writer:  # TensorBoard's own files need the bucket's client
        def __init__(self, folder, **options):
            assert folder == f"{remote}/tensorboard"

        def __getattr__(self, name):
            return lambda *arguments: None

    monkeypatch.setattr(tensorboardX, "SummaryWriter", Writer)
    with MetricsLog(remote, 1) as log:
        log.write(2, {"loss": 1.0})
    lines = [json.loads(line) for line in (local / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 2.0), (2, 1.0)]
    assert NonFiniteSteps(remote, 0, ()).count == 0

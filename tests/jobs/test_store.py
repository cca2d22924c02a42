"""Files and jobs on disk, as a crash may leave them."""

import io
from pathlib import Path

import pytest

from loraserve.jobs.files import FileNotFound, FileStore, plain_name
from loraserve.jobs.ids import is_id, new_id
from loraserve.jobs.job import Job, JobNotFound, JobStore

JOB = Job(
    id=new_id("ftjob"), created_at=0, model="tiny", base_fingerprint="sha256:x", name="nova", suffix=None,
    training_file="file-x", validation_file=None, n_epochs=1, batch_size=1, learning_rate_multiplier=1.0, seed=1,
    targets=["q_proj"], metadata={"a": "b"}, process=[1, 2.5], result_files=["file-y"],
)  # fmt: skip


def test_ids_are_in_the_order_of_their_making() -> None:
    ids = [new_id("file") for _ in range(1000)]
    assert ids == sorted(ids) and len(set(ids)) == 1000 and all(is_id("file", i) for i in ids)
    assert not any(is_id("ftjob", i) for i in ids)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("a.jsonl", "a.jsonl"),
        ("../../b.jsonl", "b.jsonl"),
        ("C:\\x\\诗.jsonl", "诗.jsonl"),
        ("a\r\nb\x00", "a__b_"),
        ("", "file"),
    ],
)
def test_a_clients_name_is_kept_without_its_path(given: str, kept: str) -> None:
    assert plain_name(given) == kept
    assert plain_name("x" * 300) == "x" * 255


def test_a_file_of_which_only_a_part_was_written_is_not_there(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    stored = store.add(io.BytesIO(b"content"), "a.jsonl", "fine-tune")
    assert store.get(stored.id) == stored and store.path(stored.id).read_bytes() == b"content"
    (tmp_path / f"{stored.id}.json").unlink()
    assert list(store.iterate()) == []
    with pytest.raises(FileNotFound):
        store.path(stored.id)


def test_a_job_comes_back_as_it_was(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    store.save(JOB)
    assert store.get(JOB.id) == JOB and list(store.iterate()) == [JOB]
    with pytest.raises(JobNotFound):
        store.get(new_id("ftjob"))


def test_an_event_that_a_crash_has_torn_harms_no_other(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    store.save(JOB)
    store.log(JOB, "first")
    with open(store.folder(JOB.id) / "events.jsonl", "ab") as file:
        file.write(b'\n{"id": "ftev')
    store.log(JOB, "second", data={"step": 1})
    assert [(event["message"], event["type"]) for event in store.events(JOB.id)] == [
        ("first", "message"),
        ("second", "metrics"),
    ]

import json

from loraserve.train.report import Metrics


def test_metrics_of_an_interrupted_run_are_kept_up_to_its_checkpoint(tmp_path):
    """Catches steps counted twice after a resume, and a line torn by a kill that swallows the next one."""
    path = tmp_path / "run" / "metrics.jsonl"
    metrics = Metrics(path, done=0)
    metrics.add({"step": 0, "val_loss": 9.0})
    for step in range(1, 6):
        metrics.add({"step": step, "loss": 1.0 / step})
    metrics.close()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    resumed = Metrics(path, done=4)
    assert resumed.losses == [(step, 1.0 / step) for step in range(1, 5)]
    resumed.add({"step": 5, "loss": 0.5})
    resumed.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5] and rows[-1]["loss"] == 0.5
    torn = Metrics(path.with_name("torn.jsonl"), done=9)
    torn.close()
    path.with_name("torn.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    torn = Metrics(path.with_name("torn.jsonl"), done=9)
    torn.add({"step": 2, "loss": 1.0})
    torn.close()
    assert torn.losses == [(1, 2.0), (2, 1.0)]
    assert path.with_name("torn.jsonl").read_text().count("\n") == 2

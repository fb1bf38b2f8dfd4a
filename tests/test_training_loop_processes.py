"""Training in processes of its own: one that is killed, and two that share each batch."""

import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from training_runs import Discs, checkpoint, metrics, run, start, tiny_model, weights


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than the rest of these runs."""
    monkeypatch.setattr("transfiner_refine.training.metrics.draw_metrics", lambda records: b"")


@pytest.fixture
def whole_run(tmp_path: Path) -> Path:
    """All six steps in this process."""
    run(tmp_path / "whole")
    return tmp_path / "whole"


def test_killed_it_loses_no_more_than_the_steps_since_its_checkpoint(whole_run: Path, tmp_path: Path):
    """Killed in step 5, resumed from step 4: the weights are those of the run that was left alone, bit by bit."""
    directory = tmp_path / "killed"
    process = start("hang_in_step_5", directory)
    try:
        deadline = time.monotonic() + 300
        while not stands_at(directory, 4) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert [record["step"] for record in metrics(directory)] == [0]
    (directory / "last.tmp").write_bytes(b"half of a checkpoint")
    dataset = Discs()
    run(directory, dataset)
    assert len(dataset.seen) == 4
    # The killed run has one record of all six steps, the other one of each two.
    expected = sum(record["loss"] for record in metrics(whole_run)[1:]) / 3
    assert metrics(directory)[-1]["loss"] == pytest.approx(expected)
    for part in ("model", "average"):
        ours, theirs = checkpoint(directory)[part], checkpoint(whole_run)[part]
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def stands_at(directory: Path, step: int) -> bool:
    return (directory / "last.pt").exists() and checkpoint(directory)["progress"]["step"] == step


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(whole_run: Path, tmp_path: Path):
    """Half of each batch in either process, over gloo on the loopback interface."""
    directory = tmp_path / "two"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    group |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    processes = [start("six_steps", directory, group | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    try:
        assert [process.wait(300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    ours, theirs = metrics(directory), metrics(whole_run)
    assert [record["step"] for record in ours] == [0, 2, 4, 6], "one of them writes"
    for name in ("loss", "loss_refine", "loss_incoherence", "gradient_norm", "wrong_after"):
        expected = [record[name] for record in theirs[1:]]
        assert [record[name] for record in ours[1:]] == pytest.approx(expected, rel=1e-4), name
    before, after, together = tiny_model().state_dict(), weights(whole_run), weights(directory)
    moved = max(float((after[name] - before[name]).abs().max()) for name in after)
    apart = max(float((after[name] - together[name]).abs().max()) for name in after)
    assert apart < 0.01 * moved

"""``torchrun -m unbraid train`` from a shell: the bundle of one process, a process that is killed, one that starts again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from together_kit import free_port, uneven_log
from toylog import make_data, make_run

from unbraid import config, store
from unbraid.encoders.table import Views
from unbraid.train import Training

pytestmark = pytest.mark.slow
TOLERANCE = 1e-3  # of metrics, in single precision


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """A run whose tables are divided over processes."""
    return written(place, "run.toml", Views(width=4, lazy_rows=0, shard_mb=1e-9))


@pytest.fixture(scope="module")
def replicated(place: Path) -> Path:
    """The same, with all tables in all processes."""
    return written(place, "replicated.toml", Views(width=4, lazy_rows=0))


@pytest.fixture(scope="module")
def undisturbed(run: Path, place: Path) -> dict[str, Any]:
    """What one process makes of either."""
    return trained(1, run, place / "one")


def written(folder: Path, name: str, tables: Views) -> Path:
    uneven_log().write_parquet(folder / "log.parquet")
    data = make_data(rows=str(folder / "log.parquet"))
    training = Training(batch_size=64, steps=200, evaluate_every=50, checkpoint_steps=20, checkpoint_seconds=0)
    model = config.ModelChoice(tables=tables)
    (folder / name).write_text(config.dumps(make_run(data=data, training=training, model=model)))
    return folder / name


def command(processes: int, run: Path, out: Path, *options: str, restarts: int = 0) -> list[str]:
    train = ["-m", "unbraid", "train", str(run), "--out", str(out), "--no-report", "--no-baseline", *options]
    if processes == 1:
        return [sys.executable, *train]
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    start += ["--monitor-interval", "1"]  # time for a process to say why it ends, before torchrun ends it
    return [*start, "--master-port", str(free_port()), "--max-restarts", str(restarts), *train]


def finished(made: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(made, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)


def trained(processes: int, run: Path, out: Path, *options: str) -> dict[str, Any]:
    found = finished(command(processes, run, out, *options))
    assert found.returncode == 0, found.stderr
    return json.loads((out / "metrics.json").read_text())


def killed(processes: int, run: Path, out: Path, which: int, restarts: int = 0) -> tuple[int, str]:
    """Kill a process with SIGKILL once there is a checkpoint; returns what the whole ended with and said."""
    made = command(processes, run, out, restarts=restarts)
    with subprocess.Popen(
        made, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as job:  # fmt: skip
        until = time.monotonic() + 200
        while not (out / "fit-0.safetensors").exists():
            assert job.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        os.kill(process_of(job.pid, which), signal.SIGKILL)
        said, _ = job.communicate(timeout=200)
    return job.returncode, said


def process_of(parent: int, rank: int | str = "") -> int:
    """The process of a rank, or any, among the children of torchrun."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            mine = int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent
            ranks = [e for e in (folder / "environ").read_bytes().split(b"\0") if e.startswith(b"RANK=")]
            if mine and any(each.decode() == f"RANK={rank}" or rank == "" for each in ranks):
                return int(folder.name)
        except (OSError, ValueError):
            continue
    raise AssertionError(f"no process of rank {rank}")


def gaps(one: Any, two: Any) -> float:
    """The largest difference of two metrics."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        return max((gaps(value, two[key]) for key, value in one.items()), default=0.0)
    return abs(one - two) if isinstance(one, float) else 0.0 if one == two else float("inf")


def test_two_processes_make_the_bundle_of_one(
    run: Path, undisturbed: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    one, two = undisturbed, trained(2, run, tmp_path / "two")
    assert gaps(one["test"], two["test"]) <= TOLERANCE and one["steps"] == two["steps"] == 200
    assert sorted(p.name for p in (place / "one").iterdir()) == sorted(p.name for p in (tmp_path / "two").iterdir())
    before, after = (store.load(folder / "weights.safetensors") for folder in (place / "one", tmp_path / "two"))
    assert gaps(json.loads(json.dumps(_shapes(before))), json.loads(json.dumps(_shapes(after)))) == 0
    lines = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [50, 100, 150, 200], "the log is written once"


def _shapes(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _shapes(inner) for key, inner in value.items()}
    return list(value.shape) if hasattr(value, "shape") else str(type(value))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the process in /proc")
@pytest.mark.parametrize(("before", "which", "after"), [(2, 1, 1), (2, 0, 2), (1, 0, 2)])
def test_a_killed_process_ends_the_job_and_resume_continues(
    before: int, which: int, after: int, run: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    if before == 1:
        job = subprocess.Popen(command(1, run, out), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while not (out / "fit-0.safetensors").exists():
            assert job.poll() is None
            time.sleep(0.05)
        job.kill()
        job.wait()
    else:
        code, said = killed(before, run, out, which)
        assert code != 0 and "SIGKILL" in said and 'Traceback (most recent call last):\n  File "' + str(run) not in said
        assert "--resume" in said
    assert not (out / "metrics.json").exists()
    found = trained(after, run, out, "--resume")
    assert gaps(undisturbed["test"], found["test"]) <= TOLERANCE and found["steps"] == undisturbed["steps"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the process in /proc")
def test_torchrun_starts_a_training_again(replicated: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    code, said = killed(2, replicated, tmp_path / "again", 1, restarts=1)
    assert code == 0, said
    assert "resumed at step" in said
    found = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert gaps(undisturbed["test"], found["test"]) <= TOLERANCE


def machine(run: Path, out: Path, port: int, nodes: str, name: str) -> list[str]:
    """torchrun of one of the machines that find each other at a port."""
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        nodes,
        "--nproc-per-node",
        "1",
        "--max-restarts",
        "3",
    ]
    find = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", name]
    return [*start, *find, *command(1, run, out)[1:]]


def started(made: list[str], cache: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "UNBRAID_CACHE": str(cache)}
    return subprocess.Popen(made, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the process in /proc")
def test_what_is_left_of_two_machines_goes_on(replicated: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    out, port = tmp_path / "out", free_port()
    first = started(machine(replicated, out, port, "1:2", "left"), tmp_path / "cache1")
    time.sleep(2)  # the first one is where they meet, and stays
    second = started(machine(replicated, out, port, "1:2", "left"), tmp_path / "cache2")
    until = time.monotonic() + 200
    while not (out / "fit-0.safetensors").exists():
        assert first.poll() is None and second.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    worker = process_of(second.pid)
    for each in (second.pid, worker):
        os.kill(each, signal.SIGKILL)
    second.communicate(timeout=100)
    said, _ = first.communicate(timeout=200)
    assert first.returncode == 0 and "resumed at step" in said, said
    found = json.loads((out / "metrics.json").read_text())
    assert gaps(undisturbed["test"], found["test"]) <= TOLERANCE


def test_a_mistake_is_told_once(run: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("mine")
    found = finished(command(2, run, tmp_path / "full"))
    assert found.returncode != 0 and found.stderr.count("is not empty and holds no run") == 1
    jobs = "schedule={kind = 'fork_merge', targets = ['click'], jobs = 3}"
    found = finished(command(2, run, tmp_path / "jobs", "--set", jobs))
    assert "`schedule.jobs` should divide the number of processes that train together, 2. Found 3." in found.stderr
    assert not any((tmp_path / "jobs").iterdir()), "the folder is free for the next try"


def test_other_commands_are_for_one_process(tmp_path: Path) -> None:
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    found = finished([*start, "-m", "unbraid", "recipes"])
    assert found.returncode != 0 and "several processes of `unbraid recipes`" in found.stderr


THREADS = """
import torch
from pathlib import Path
from unbraid import parallel
with parallel.together("cpu"):
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    torch.optim.Adam([weight]).step()
    parallel.wait()
left = [name for path in Path("/proc/self/task").glob("*/comm") if "gloo" in (name := path.read_text())]
assert not left, left
"""


def test_the_threads_that_talk_end_with_the_group(tmp_path: Path) -> None:
    """One that outlives it may abort the process as the interpreter ends."""
    (tmp_path / "threads.py").write_text(THREADS)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = finished([*start, str(tmp_path / "threads.py")])
    assert found.returncode == 0, found.stderr

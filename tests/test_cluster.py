"""cluster/slurm.sbatch as shipped, submitted to a real scheduler: make test-cluster."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kit import make_corpus, make_dataset, run, same_bits, scalars
from slurm import Job, Slurm, missing, wait_for
from test_lm_main import EPOCH
from test_resnet_main import SUMMARY

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(missing()), reason="needs slurm-wlm and munge: make test-cluster"),
]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs")

TWO_BY_TWO = "--nodes 2 --ntasks-per-node 2 --cpus-per-task 1"
SMALL = ("--emsize", 8, "--nhid", 8, "--batch_size", 4, "--bptt", 5)
# A run that a signal finds under way, with dropout: its bits depend on every step.
EPOCHS = 24


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with Slurm() as slurm:
        yield slurm


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "set")


def train(slurm: Slurm, corpus: Path, folder: Path, options: str, *flags: object) -> Job:
    """A small language model, saved in `folder`."""
    arguments = ("--data", corpus, *SMALL, *flags, "--save", folder / "model.pt")
    folder.mkdir(exist_ok=True)
    return slurm.submit(options, "lm_main.py", *arguments, log=folder / "job.log")


@pytest.fixture(scope="module")
def undisturbed(slurm: Slurm, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that trained `EPOCHS` on two nodes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = train(slurm, corpus, folder, "--nodes 2 --cpus-per-task 1", "--epochs", EPOCHS)
    assert job.wait_for_end() == "COMPLETED", job.describe()
    return folder


def test_two_nodes_train_to_the_losses_of_one_process(
    slurm: Slurm, corpus: Path, tmp_path: Path
) -> None:
    flags = ("--dropout", 0, "--epochs", 2)
    job = train(slurm, corpus, tmp_path / "job", TWO_BY_TWO, *flags)
    alone = run("lm_main.py", "--data", corpus, *SMALL, *flags, cwd=tmp_path)
    assert job.wait_for_end() == "COMPLETED", job.describe()
    assert "2 nodes, 4 processes on CPU (1 threads each), float32" in job.output()
    assert len(EPOCH.findall(job.output())) == len(EPOCH.findall(alone.out)) == 2
    one, four = scalars(tmp_path / "model.logs"), scalars(tmp_path / "job" / "model.logs")
    for tag, points in one.items():
        assert [v for _, v in four[tag]] == pytest.approx([v for _, v in points], rel=1e-4)


def test_two_nodes_evaluate_images_to_the_figures_of_one_process(
    slurm: Slurm, tmp_path: Path
) -> None:
    data = make_dataset(tmp_path / "set", val=37)
    small = ("--image-size", 32, "--stem", "stock", "--epochs", 1, "-b", 8)
    trained = run("resnet_main.py", data, *small, cwd=tmp_path)
    checkpoint = tmp_path / "output" / "resnet18-cpu" / "checkpoint.pth"
    flags = ("resnet_main.py", data, "-e", "-b", 8, "--resume", checkpoint)
    job = slurm.submit(TWO_BY_TWO, *flags, log=tmp_path / "job.log")
    assert job.wait_for_end() == "COMPLETED", job.describe()
    assert "2 nodes, 4 processes on CPU" in job.output()
    figures = SUMMARY.findall(job.output())
    assert len(figures) == 1
    assert figures == SUMMARY.findall(trained.out)


def test_a_job_warned_and_then_preempted_ends_with_the_bits_of_an_undisturbed_one(
    slurm: Slurm, corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    job = train(slurm, corpus, tmp_path, "--nodes 2 --cpus-per-task 1", "--epochs", EPOCHS)
    job.wait_for_output("end of epoch   2")
    slurm.run("scancel", "--signal=USR1", job.number)
    resumed = re.compile("=> loaded .*end of epoch", re.DOTALL)
    wait_for(lambda: resumed.search(job.output()), job.describe, 90)
    urgent = ("--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=true")
    slurm.run("sbatch", *urgent)
    assert job.wait_for_end() == "COMPLETED", job.describe()
    assert job["Restarts"] == "2", job.describe()
    stopped = re.findall(r"=> epoch (\d+), step (\d+): saved to", job.output())
    assert stopped == re.findall(
        r"=> loaded checkpoint '\S+' \(epoch (\d+), step (\d+)\)", job.output()
    )
    assert len(stopped) == 2, job.describe()
    same_bits(tmp_path / "model.checkpoint.pt", undisturbed / "model.checkpoint.pt")


def test_a_warning_while_python_starts_is_kept(slurm: Slurm, corpus: Path, tmp_path: Path) -> None:
    job = train(slurm, corpus, tmp_path, "--nodes 2 --cpus-per-task 1", "--epochs", 1)
    wait_for(lambda: job["JobState"] == "RUNNING", job.describe, 60)
    time.sleep(1)
    slurm.run("scancel", "--signal=USR1", job.number)
    assert job.wait_for_end() == "COMPLETED", job.describe()
    assert job["Restarts"] == "1", job.describe()
    assert "saved to" not in job.output()


def test_the_time_limit_s_warning_leads_back_to_the_queue_and_cancelling_does_not(
    slurm: Slurm, corpus: Path, tmp_path: Path
) -> None:
    job = train(slurm, corpus, tmp_path, "--time 1 --cpus-per-task 1", "--epochs", 100_000)
    # Of a limit shorter than two minutes the scheduler warns within half a minute.
    wait_for(lambda: job["Restarts"] == "1", job.describe, 90)
    slurm.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
    # Not for a checkpoint: on a busy machine the warning finds Python still starting.
    wait_for(lambda: job["JobState"] == "RUNNING", job.describe, 90)
    assert job["Restarts"] == "1"
    slurm.run("scancel", job.number)
    assert job.wait_for_end() == "CANCELLED", job.describe()
    assert job["Restarts"] == "1"


@NO_GPU
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("--gpus-per-node 1", "1 process(es) with a GPU each were asked for"),
        ("--gpus-per-node 4 --ntasks-per-node 4", "4 process(es) with a GPU each were asked for"),
        # Eight start so unevenly on two cores that the first of them is not the first to speak.
        (
            "--nodes 2 --gpus-per-node 2 --ntasks-per-node 2",
            "2 process(es) with a GPU each were asked for",
        ),
        ("--gpus-per-node 4", "4 GPUs need as many processes: --ntasks-per-node 4"),
    ],
)
def test_a_failing_job_stays_failed_and_says_why_once(
    slurm: Slurm, options: str, error: str, tmp_path: Path
) -> None:
    """The scheduler believes in GPUs here; the kit looks."""
    command = (f"--cpus-per-task 1 {options}", "resnet_main.py", "sample")
    job = slurm.submit(*command, log=tmp_path / "job.log")
    assert job.wait_for_end() == "FAILED", job.describe()
    assert job["Restarts"] == "0"
    lines = re.findall(r"^(?:resnet_main.py|slurm.sbatch): error: (.*)", job.output(), re.MULTILINE)
    assert len(lines) == 1, job.describe()
    assert lines[0].startswith(error)


def test_two_jobs_on_one_node_do_not_collide(slurm: Slurm, corpus: Path, tmp_path: Path) -> None:
    options = "--nodelist n1 --ntasks-per-node 2 --cpus-per-task 1"
    jobs = [
        train(slurm, corpus, tmp_path / name, options, "--epochs", EPOCHS) for name in ("a", "b")
    ]
    for job in jobs:
        job.wait_for_output("end of epoch   1")
    assert [job["JobState"] for job in jobs] == ["RUNNING", "RUNNING"]
    assert [job.wait_for_end() for job in jobs] == ["COMPLETED", "COMPLETED"], jobs[0].describe()
    same_bits(tmp_path / "a" / "model.checkpoint.pt", tmp_path / "b" / "model.checkpoint.pt")


def test_a_warned_task_of_an_array_goes_on_and_its_neighbours_are_left_alone(
    slurm: Slurm, corpus: Path, tmp_path: Path
) -> None:
    """The last task, whose own number is that of the whole array; all on one node."""
    options = "--array 1-3 --nodelist n1 --ntasks-per-node 2 --cpus-per-task 1"
    flags = ("--epochs", EPOCHS, "--resume", "auto")
    for number in ("1", "2", "3"):
        (tmp_path / number).mkdir()
    array = train(slurm, corpus, tmp_path / "%a", options, *flags).number
    tasks = [Job(slurm, f"{array}_{i}", tmp_path / f"{i}" / "job.log") for i in (1, 2, 3)]
    for task in tasks:
        task.wait_for_output("end of epoch   1")
    # scontrol would show the whole array under that number.
    numbers = {task["JobId"] for task in tasks}
    assert array in numbers and len(numbers) == 3
    warned = next(task for task in tasks if task["JobId"] == array)
    slurm.run("scancel", "--signal=USR1", warned.number)
    assert [task.wait_for_end(300) for task in tasks] == ["COMPLETED"] * 3, warned.describe()
    restarts = [task["Restarts"] for task in tasks]
    assert restarts == ["1" if task is warned else "0" for task in tasks], warned.describe()
    assert warned.output().count("=> loaded checkpoint") == 1
    for other in ("2", "3"):
        ended = [tmp_path / name / "model.checkpoint.pt" for name in ("1", other)]
        same_bits(*ended)

"""Several processes train one run: as one process would, under every launcher, through stops and deaths."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from tests.fakehub import TOKEN
from tests.forkserver import slowly
from tests.launching import free_port, start_together
from tests.training.test_resume import COMMON, are_equal

from phoque.distributed.launch import Launch, find_launch, first_node, launch
from phoque.distributed.processes import Processes, deal

MORE = ["--max-steps", 6, "--save-steps", 2, "--batch-size", 8, "--lora-dropout", 0]


@pytest.fixture
def asked(tiny_llama, rows):
    return ["train", "--base-model", tiny_llama, "--dataset", rows, *COMMON, *MORE]


@pytest.fixture
def start_all(start, asked):
    """Start `count` processes of one run, as a launcher does."""
    return lambda *more, **options: start_together(start, *asked, *more, **options)


@pytest.fixture
def train_all(start_all):
    def run(*more, expect=(0, 0), **options):
        ran = [one.ended() for one in start_all(*more, **options)]
        assert [one.code for one in ran] == list(expect), "\n".join(one.err for one in ran)
        return ran

    return run


def adapter_in(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def losses_in(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["accuracy"]) for line in lines if "loss" in line]


def assert_same(one, two):
    """The adapters are equal to 1e-6, and so are the losses; each step is there once.

    Adam divides a gradient by its size, and so a few elements whose gradient is rounding alone move by rounding: up to
    1e-5 with these rows, where a step moves by 0.01.
    """
    first, second = adapter_in(one), adapter_in(two)
    gaps = torch.cat([(first[name] - second[name]).abs().flatten() for name in first])
    assert gaps.quantile(0.99) <= 1e-6 and gaps.max() <= 1e-4
    assert losses_in(one) == [(n, pytest.approx(loss, abs=1e-5), acc) for n, loss, acc in losses_in(two)]
    assert [step for step, *_ in losses_in(one)] == list(range(1, 1 + len(losses_in(one))))


@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_two_processes_train_what_one_does(train_all, phoque, asked, tmp_path, launcher):
    ran = train_all("--output-dir", tmp_path / "two", "--json", launcher=launcher)
    assert ran[0].json["steps"] == 6 and not ran[1].out and not ran[1].err
    phoque(*asked, "--micro-batch", 4, "--output-dir", tmp_path / "one")
    assert_same(tmp_path / "two", tmp_path / "one")
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert record["processes"] == 2 and record["rows_per_step"] == 2 and record["fingerprint"]["micro_batch"] == 4


@pytest.mark.thorough
@pytest.mark.parametrize("more", [["--packing", "exact"], ["--micro-batch", 2], ["--engine-mode", "compile"]])
def test_so_they_do_however_rows_are_packed_and_layers_run(train_all, phoque, asked, tmp_path, more):
    train_all("--output-dir", tmp_path / "two", *more)
    alone = more if "--micro-batch" in more else [*more, "--micro-batch", 4]
    phoque(*asked, *alone, "--output-dir", tmp_path / "one")
    assert_same(tmp_path / "two", tmp_path / "one")


@pytest.mark.thorough
def test_a_stopped_run_goes_on_with_any_number_of_processes(start_all, train_all, phoque, asked, tmp_path):
    more = ["--lora-dropout", 0.1, "--max-steps", 8, "--micro-batch", 2]
    train_all("--output-dir", tmp_path / "whole", *more)
    for name in ("two", "one", "four"):
        out = tmp_path / name
        started = start_all("--output-dir", out, *more, preludes=(slowly(0.4), slowly(0.4)))
        started[0].until(lambda out=out: (out / "checkpoint-2").is_dir())
        os.kill(started[1].pid, signal.SIGTERM)  # one is told, and all stop
        assert [one.ended().code for one in started] == [75, 75]
    train_all("--output-dir", tmp_path / "two", *more)
    phoque(*asked, "--output-dir", tmp_path / "one", *more)
    train_all("--output-dir", tmp_path / "four", *more, count=4, expect=(0,) * 4)
    for name in ("two", "one", "four"):
        assert_same(tmp_path / name, tmp_path / "whole")
    error = train_all("--output-dir", tmp_path / "whole", *more, "--max-steps", 9, count=3, expect=(2, 1, 1))[0].error
    assert "4 packed rows, not a multiple of the 3 processes" in error[0] and "began with these rows" in error[1]


@pytest.mark.parametrize(
    "quantization",
    ["fp32", pytest.param("nf4", marks=pytest.mark.thorough), pytest.param("fp8", marks=pytest.mark.thorough)],
)
def test_a_sharded_base_trains_what_a_whole_one_does(train_all, start_all, phoque, asked, tmp_path, quantization):
    """Also after a stop, and with a held-out loss, which all processes measure."""
    more = ["--quantization", quantization, "--eval-steps", 2, "--max-steps", 6]
    if quantization == "fp32":
        started = start_all("--fsdp", *more, "--output-dir", tmp_path / "two", preludes=(slowly(0.4), slowly(0.4)))
        started[0].until(lambda: (tmp_path / "two" / "checkpoint-2").is_dir())
        os.kill(started[0].pid, signal.SIGTERM)
        assert [one.ended().code for one in started] == [75, 75]
    ran = train_all("--fsdp", *more, "--output-dir", tmp_path / "two", "--json")
    assert ran[0].json["held_out_loss"]["after"] < ran[0].json["held_out_loss"]["before"]
    shards = json.loads((tmp_path / "two" / "run.json").read_text())["fsdp"]
    assert shards["gb"] > 0 and shards["gb_per_process"] == pytest.approx(shards["gb"] / 2)
    phoque(*asked, *more, "--micro-batch", 4, "--output-dir", tmp_path / "one")
    assert_same(tmp_path / "two", tmp_path / "one")
    error = phoque(*asked, *more, "--fsdp", "--output-dir", tmp_path / "alone", expect=2).error
    assert "at least two processes" in error[0]


@pytest.mark.thorough
def test_a_sharded_run_keeps_its_best_step_and_goes_on_without_sharding(train_all, phoque, asked, tmp_path):
    more = ["--keep-best", "--eval-steps", 1, "--early-stop", 2, "--learning-rate", 0.05, "--max-steps", 16]
    ran = train_all("--fsdp", *more, "--output-dir", tmp_path / "two", "--json")
    alone = phoque(*asked, *more, "--micro-batch", 4, "--output-dir", tmp_path / "one", "--json")
    assert ran[0].json["steps"] == alone.json["steps"] < 16
    assert ran[0].json["adapter_step"] == alone.json["adapter_step"]
    assert_same(tmp_path / "two", tmp_path / "one")
    train_all("--fsdp", "--output-dir", tmp_path / "three", "--max-steps", 4)
    steps = ["--max-steps", 6, "--allow-change", "max_steps"]
    train_all("--output-dir", tmp_path / "three", *steps)
    record = json.loads((tmp_path / "three" / "run.json").read_text())
    assert "fsdp" not in record and record["engine"]["reason"] != "as before the resume"
    train_all("--output-dir", tmp_path / "four", "--max-steps", 4)
    train_all("--output-dir", tmp_path / "four", *steps)
    assert_same(tmp_path / "three", tmp_path / "four")


def test_a_batch_that_cannot_be_shared_out_is_refused(train_all, tmp_path):
    ran = train_all("--output-dir", tmp_path / "run", "--batch-size", 5, expect=(2, 1))
    assert "--batch-size 5 cannot be dealt to 2 processes" in ran[0].error[0] and not ran[1].err
    ran = train_all("--output-dir", tmp_path / "run", "--micro-batch", 8, expect=(2, 1))
    assert "leave --micro-batch out" in ran[0].error[2]


@pytest.mark.thorough
def test_one_process_writes_measures_and_pushes(train_all, hub, tmp_path):
    more = [
        "--hub-model-id",
        "harbour/seal",
        "--keep-best",
        "--early-stop",
        1,
        "--eval-steps",
        1,
        "--learning-rate",
        0.5,
    ]
    ran = train_all("--output-dir", tmp_path / "run", *more, "--json", env={"HF_TOKEN": TOKEN})
    assert ran[0].json["steps"] < 6 and ran[0].json["repo"] == "harbour/seal"  # both ended early
    titles = [commit.title for commit in hub.repos["models", "harbour/seal"].commits]
    assert titles[-1] == "Adapter" and len(titles) == len(set(titles))
    assert are_equal(
        load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors"), adapter_in(tmp_path / "run")
    )


@pytest.mark.thorough
@pytest.mark.parametrize(("rank", "more"), [(0, []), (1, []), (1, ["--fsdp"])])
def test_a_process_that_dies_takes_the_others_down(start_all, train_all, tmp_path, rank, more):
    out, more = tmp_path / "run", ["--max-steps", 8, *more]
    train_all("--output-dir", tmp_path / "whole", *more)
    started = start_all("--output-dir", out, *more, preludes=(slowly(0.4), slowly(0.4)))
    started[0].until(lambda: (out / "checkpoint-2").is_dir())
    os.kill(started[rank].pid, signal.SIGKILL)
    begun = time.monotonic()
    survivor = started[1 - rank].ended()
    assert survivor.code == 1 and time.monotonic() - begun < 30
    assert "lost the connection to another process" in survivor.err or "process 0 is gone" in survivor.err
    assert started[rank].ended().code == -signal.SIGKILL
    train_all("--output-dir", out, *more)
    assert_same(out, tmp_path / "whole")


@pytest.mark.alone
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_process_that_is_frozen_takes_the_others_down_within_a_minute(start_all, tmp_path, frozen):
    out = tmp_path / "run"
    started = start_all("--output-dir", out, "--max-steps", 40, preludes=(slowly(0.4), slowly(0.4)))
    started[0].until(lambda: (out / "checkpoint-2").is_dir())
    os.kill(started[frozen].pid, signal.SIGSTOP)
    begun = time.monotonic()
    try:
        other = started[1 - frozen].ended()
        assert other.code == 1 and time.monotonic() - begun < 60
        assert f"process {frozen} has given no sign of life" in other.err
    finally:
        os.kill(started[frozen].pid, signal.SIGKILL)
    assert started[frozen].ended().code == -signal.SIGKILL


SLOW_PUSH = """
import time
from phoque.distributed import processes
from phoque.training import run
processes.HEARTBEAT_S, processes.HEARTBEAT_TIMEOUT_S = 0.2, 1.5
steps = run.take_steps
def stop_and_push(*given, **named):
    stopped = steps(*given, **named)
    if processes.current().is_main:
        time.sleep(4)
    return stopped
run.take_steps = stop_and_push
"""


@pytest.mark.thorough
def test_a_process_may_push_longer_than_heartbeats_may_be_missed(start_all, tmp_path):
    out = tmp_path / "run"
    preludes = (slowly(0.4) + SLOW_PUSH, slowly(0.4) + SLOW_PUSH)
    started = start_all("--output-dir", out, "--max-steps", 40, preludes=preludes)
    started[0].until(lambda: (out / "checkpoint-2").is_dir())
    os.kill(started[0].pid, signal.SIGTERM)
    assert [one.ended().code for one in started] == [75, 75]


STALE_SIZE = """
from phoque.data.stream import TrainStream
from phoque.errors import RunError
build = TrainStream._build_batch
built = []
def build_some(self, row):
    built.append(row)
    if len(built) > 2:
        raise RunError(what="A row is of another size.", why="It is.", fix="Delete it.")
    return build(self, row)
TrainStream._build_batch = build_some
"""


@pytest.mark.thorough
def test_an_error_that_one_process_meets_is_shown(start_all, tmp_path):
    started = start_all("--output-dir", tmp_path / "run", preludes=("", STALE_SIZE))
    ended = [one.ended() for one in started]
    assert [one.code for one in ended] == [1, 1]
    assert "A row is of another size." in ended[1].err and "lost the connection" in ended[0].err


def test_a_process_that_encodes_otherwise_is_refused(start_all, tmp_path):
    longer = "from phoque.training.prepare import Prepared\nPrepared.encoding_digest = lambda self: 'other'\n"
    started = start_all("--output-dir", tmp_path / "run", preludes=("", longer))
    ended = [one.ended() for one in started]
    assert ended[1].code == 1 and "encodes the data otherwise" in ended[1].err and "row-sizes" in ended[1].err


SLOW_START = """
import time
from phoque.distributed import processes
from phoque.training import report_to, run
processes.HEARTBEAT_S, processes.HEARTBEAT_TIMEOUT_S = 0.2, 1.0
start = report_to.start_services
run.start_services = lambda *given: (time.sleep(3), start(*given))[1]
"""


@pytest.mark.thorough
def test_a_process_that_begins_late_is_not_taken_for_dead(train_all, tmp_path):
    train_all("--output-dir", tmp_path / "run", preludes=(SLOW_START, SLOW_START))


@pytest.mark.thorough
def test_the_others_stay_until_process_0_has_pushed(start_all, hub, tmp_path):
    """A launcher takes one that ends before it for one that failed, and ends them all."""
    more = ["--hub-model-id", "harbour/seal", "--output-dir", tmp_path / "run", "--max-steps", 40]
    started = start_all(*more, env={"HF_TOKEN": TOKEN}, preludes=(slowly(0.4), slowly(0.4)))
    started[0].until(lambda: (tmp_path / "run" / "checkpoint-2").is_dir())
    hub.faults.add("POST .*/commit/", "slow", times=3, seconds=2.0)
    for one in started:
        os.kill(one.pid, signal.SIGTERM)
    seen = set()
    while started[0].poll() is None:
        seen.add(started[1].poll())
        time.sleep(0.05)
    assert seen == {None} and [one.ended().code for one in started] == [75, 75]
    titles = [commit.title for commit in hub.repos["models", "harbour/seal"].commits]
    newest = max(int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-*"))
    assert titles[-1] == f"Step {newest}"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_real_launchers_train_the_same(phoque, asked, tmp_path, launcher):
    module = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    if launcher == "accelerate":
        module = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
        module += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())]
    command = [sys.executable, *module, "-m", "phoque", *map(str, asked), "--output-dir", str(tmp_path / "two")]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"WANDB_MODE": "disabled"})
    assert ran.returncode == 0, ran.stderr
    phoque(*asked, "--micro-batch", 4, "--output-dir", tmp_path / "one")
    assert_same(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_two_nodes_with_disks_of_their_own(phoque, asked, tmp_path):
    """torchrun with rendezvous, one process per node; the second one is resumed with what the first has."""
    port = free_port()

    def run_nodes(*more):
        nodes = []
        for rank in range(2):
            disk = tmp_path / f"node-{rank}"
            disk.mkdir(exist_ok=True)
            command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(rank)]
            command += ["--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
            command += ["-m", "phoque", *map(str, asked), "--output-dir", "run", *map(str, more)]
            env = os.environ | {"WANDB_MODE": "disabled"}
            nodes.append(subprocess.Popen(command, cwd=disk, env=env, stderr=subprocess.PIPE, text=True))
        texts = [node.communicate()[1] for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], "\n".join(texts)

    run_nodes("--max-steps", 4)
    run_nodes("--max-steps", 6, "--allow-change", "max_steps")
    assert not (tmp_path / "node-1" / "run" / "adapter").exists()
    assert (tmp_path / "node-1" / "run" / "checkpoint-4" / "optimizer.pt").is_file()  # which it was given
    assert [step for step, *_ in losses_in(tmp_path / "node-0" / "run")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.thorough
def test_all_processes_answer_and_train_the_controls(start, phoque, tmp_path, tmp_path_factory, rows):
    from tests import tiny

    base, port = tiny.talking_llama(tmp_path_factory.mktemp("talking") / "llama"), free_port()
    asked = ["train", "--base-model", base, "--dataset", rows, *COMMON, *MORE, "--with-control"]
    names = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WANDB_MODE": "disabled"}
    more = ["--output-dir", tmp_path / "run", "--json"]
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    ran = [one.ended() for one in [start(*asked, *more, env=names | rank) for rank in ranks]]
    assert [one.code for one in ran] == [0, 0], ran[0].err + ran[1].err
    assert ran[0].json["controls"] == [str(tmp_path / "run" / "control-1")]
    record = json.loads((tmp_path / "run" / "control-1" / "run.json").read_text())
    assert record["processes"] == 2 and record["result"]["steps"] == 6
    phoque(*asked, "--micro-batch", 4, "--output-dir", tmp_path / "one", env={"WANDB_MODE": "disabled"})
    (together,), (alone,) = (list((tmp_path / name).glob("control-rows-*.jsonl")) for name in ("run", "one"))
    assert together.read_text() == alone.read_text() and together.read_text().count("\n") > 10


def test_gpus_that_are_not_there_are_refused(phoque, asked, tmp_path):
    error = phoque(*asked, "--output-dir", tmp_path / "run", "--gpus", 2, expect=2).error
    assert "--gpus 2 needs 2 GPUs" in error[0] and "sees 0" in error[1]
    assert "--gpus" in phoque(*asked, "--gpus", "some", expect=2).error[0]


def test_the_code_of_the_process_that_failed_is_the_launchers(capfd):
    code = "import os, sys, time; rank = int(os.environ['RANK']); time.sleep(0.3 * rank); sys.exit(75 * (1 - rank))"
    assert launch(2, [sys.executable, "-c", code]) == 75
    assert launch(2, [sys.executable, "-c", "pass"]) == 0
    code = "import os, sys, time; rank = int(os.environ['RANK']); time.sleep(0.3 * (1 - rank)); sys.exit(2 - rank)"
    assert launch(2, [sys.executable, "-c", code]) == 2  # process 0 says why, though it ends later
    begun = time.monotonic()
    code = "import os, sys, time; time.sleep(60 if os.environ['RANK'] == '0' else 0); sys.exit(3)"
    from phoque.distributed import launch as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "GRACE_S", 1.0)
        assert launch(2, [sys.executable, "-c", code]) == 3 and time.monotonic() - begun < 20
    begun = time.monotonic()
    code = "import os, signal, sys; os.environ['RANK'] == '1' and os.kill(os.getpid(), signal.SIGSTOP); sys.exit(3)"
    assert launch(2, [sys.executable, "-c", code]) == 3 and time.monotonic() - begun < 20  # not GRACE_S: it is frozen
    assert "SIGKILL" not in capfd.readouterr().err


def test_every_row_is_dealt_once_and_tokens_are_even():
    lengths = [900, 20, 500, 480, 30, 700, 650, 100]
    shares = [deal(lengths, Processes(rank, 4)) for rank in range(4)]
    assert sorted(number for share in shares for number in share) == list(range(8))
    tokens = [sum(lengths[number] for number in share) for share in shares]
    assert max(tokens) - min(tokens) <= 250 and {len(share) for share in shares} == {2}
    in_order = [sum(lengths[rank::4]) for rank in range(4)]
    assert max(tokens) - min(tokens) < max(in_order) - min(in_order)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1", "RANK": "0"}, None),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, None),  # a batch script, which srun has not started
        (
            {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "pier", "MASTER_PORT": "99"},
            Launch(1, 2, 1, "pier", 99),
        ),
        (
            {
                "SLURM_STEP_NUM_TASKS": "4",
                "SLURM_PROCID": "3",
                "SLURM_LOCALID": "1",
                "SLURM_STEP_NODELIST": "pier-[07-08],quay",
                "SLURM_JOB_ID": "12",
            },
            Launch(3, 4, 1, "pier-07", 15012),
        ),
    ],
)
def test_launchers_are_recognised(monkeypatch, env, expected):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert find_launch() == expected


@pytest.mark.parametrize(
    ("nodes", "first"), [("n1", "n1"), ("n[1-3]", "n1"), ("pier-[07,09-12]", "pier-07"), ("a,b", "a")]
)
def test_the_first_node_of_a_list(nodes, first):
    assert first_node(nodes) == first


@pytest.mark.parametrize(
    ("env", "visible"),
    [
        ({"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}, "1"),
        ({"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "4,6"}, "6"),
        ({"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}, ""),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "0,1"}, "1"),
        # srun --gpus-per-task 1 shows each task its own GPU alone
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "0"}, "0"),
    ],
)
def test_a_process_sees_its_own_gpu_however_often_it_asks(monkeypatch, env, visible):
    from phoque.distributed import launch as module

    monkeypatch.setattr(module, "_claimed", None)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    first = module.claim_gpu()
    assert first.rank == 1 and os.environ["CUDA_VISIBLE_DEVICES"] == visible
    assert module.claim_gpu() is first and os.environ["CUDA_VISIBLE_DEVICES"] == visible
    alone = module.leave_launch(dict(os.environ))  # for a command of --then
    assert alone.get("CUDA_VISIBLE_DEVICES") == env.get("CUDA_VISIBLE_DEVICES")
    assert not alone.keys() & {"RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"}


def test_a_dry_run_plans_for_all_processes(start_all, tmp_path):
    ran = [one.ended() for one in start_all("--output-dir", tmp_path / "run", "--dry-run", "--json")]
    assert [one.code for one in ran] == [0, 0] and not ran[1].out
    assert "micro" in json.dumps(ran[0].json) and not (tmp_path / "run").exists()
    ran = [one.ended() for one in start_all("--output-dir", tmp_path / "run", "--dry-run", "--batch-size", 5)]
    assert ran[0].code == 2 and "cannot be dealt to 2 processes" in ran[0].error[0]

"""A run that is kept on the Hub: pushed, restored, begun afresh, and never lost."""

import json
import os
import re
import shutil
import signal

import pytest
import torch
from safetensors.torch import load
from tests.fakehub import ONE_REPOSITORY, READ_ONLY, TOKEN
from tests.forkserver import slowly
from tests.rows import row, write_rows

REPO = "harbour/seal"
COMMON = (
    "--quantization fp32 --batch-size 4 --log-every 1 --sample-every 0 --norms-every 100 --learning-rate 0.01 "
    "--lora-dropout 0.1 --hub-patience 20"
).split()


@pytest.fixture
def asked(tiny_llama, rows):
    """The arguments of a run of twelve steps; options that follow win."""
    return ["train", "--base-model", tiny_llama, "--dataset", rows, *COMMON, "--max-steps", 12, "--save-steps", 3]


@pytest.fixture
def train(phoque, asked):
    def run(*more, expect=0, repo=REPO, env=None, prelude=""):
        where = ["--hub-model-id", repo] if repo else []
        return phoque(*asked, *where, *more, expect=expect, env={"HF_TOKEN": TOKEN} | (env or {}), prelude=prelude)

    return run


@pytest.fixture
def uninterrupted_run(train, tmp_path):
    """What a run without the Hub and without interruption makes."""
    train("--output-dir", tmp_path / "whole", repo=None)
    return load((tmp_path / "whole" / "adapter" / "adapter_model.safetensors").read_bytes())


IN_TWOS = ["--save-steps", 2]


def read_hub(hub) -> dict[str, torch.Tensor]:
    return load(hub.files(REPO)["adapter_model.safetensors"].content)


def are_equal(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def commit_titles(hub) -> list[str]:
    repo = hub.repos.get(("models", REPO))
    return [c.title for c in repo.commits] if repo else []


def logged_steps(run) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def checkpoints(hub) -> set[str]:
    return {path.split("/")[0] for path in hub.files(REPO) if path.startswith("checkpoint-")}


def test_everything_is_on_the_hub_in_one_commit_a_checkpoint(train, hub, uninterrupted_run, tmp_path):
    ran = train("--output-dir", tmp_path / "run", "--json")
    assert hub.repos["models", REPO].private and are_equal(read_hub(hub), uninterrupted_run)
    pushed = [t for t in commit_titles(hub) if t.startswith("Step")]
    assert pushed == sorted(pushed, key=lambda t: int(t.split()[1])) and pushed[-1] == "Step 12"
    assert commit_titles(hub)[-1] == "Adapter" and ran.json["commit"] == hub.sha("models", REPO)
    assert "checkpoint-12" in checkpoints(hub) and len(checkpoints(hub)) == 2  # as many as are kept on disk
    files = hub.files(REPO)
    manifest = json.loads(files["checkpoint-12/MANIFEST.json"].content)["sha256"]
    assert set(manifest) | {"MANIFEST.json"} == {
        p.removeprefix("checkpoint-12/") for p in files if p.startswith("checkpoint-12")
    }
    card = files["README.md"].content.decode()
    assert "Content warning" in card and f'from_pretrained(base, "{REPO}")' in card and "12 of 12" in card
    for commit in hub.repos["models", REPO].commits:
        assert not any(re.search(r"training_args|\.env", path) for path in commit.files)
        if commit.title == "Step 3":
            assert "in progress: step 3 of 12" in commit.files["README.md"].content.decode()


def test_the_same_command_on_another_machine_goes_on(train, start, asked, hub, uninterrupted_run, tmp_path):
    process = start(
        *asked,
        *IN_TWOS,
        "--hub-model-id",
        REPO,
        "--output-dir",
        tmp_path / "one",
        env={"HF_TOKEN": TOKEN},
        prelude=slowly(),
    )
    process.until(lambda: "Step 6" in commit_titles(hub))
    os.kill(process.pid, signal.SIGKILL)
    process.ended()
    ran = train("--output-dir", tmp_path / "two")
    begun = int(re.search(r"continuing from step (\d+)", ran.err)[1])
    assert begun >= 6 and f"downloading checkpoint-{begun} from {REPO}" in ran.err
    assert are_equal(read_hub(hub), uninterrupted_run) and logged_steps(tmp_path / "two") == list(range(13))
    records = [json.loads((tmp_path / n / "run.json").read_text()) for n in ("one", "two")]
    assert records[0]["run_id"] == records[1]["run_id"]


def test_a_finished_run_is_known_on_a_new_machine_and_nothing_is_trained(train, hub, uninterrupted_run, tmp_path):
    train("--output-dir", tmp_path / "one")
    before = len(commit_titles(hub))
    ran = train("--output-dir", tmp_path / "two", "--json")
    assert "complete" in ran.err and "base folder" not in ran.err and len(commit_titles(hub)) <= before + 1
    assert are_equal(load((tmp_path / "two" / "adapter" / "adapter_model.safetensors").read_bytes()), uninterrupted_run)
    assert ran.json["adapter"] == str(tmp_path / "two" / "adapter") and logged_steps(tmp_path / "two") == list(
        range(13)
    )
    assert (tmp_path / "two" / "report.html").is_file()


@pytest.mark.parametrize(
    ("match", "kind", "options"),
    [
        ("POST .*/commit/", 503, {"times": 2}),
        ("POST .*/commit/", 429, {"Retry_After": "2"}),
        ("POST .*/commit/", "drop", {}),
        ("POST .*/commit/", "lost", {"times": 2}),
        ("POST .*/commit/", 412, {}),
        ("POST .*/commit/", "corrupt", {}),
        ("(PUT|POST) /lfs/", 500, {"times": 2}),
        ("GET .*/tree/", 503, {"times": 2}),
        ("GET /api/models/harbour/seal$", 503, {"times": 2}),
        ("POST /api/repos/create", 503, {}),
    ],
)
@pytest.mark.thorough
def test_a_push_outlives_a_fault(train, hub, uninterrupted_run, tmp_path, match, kind, options):
    fault = hub.faults.add(match, kind, **options)
    train("--output-dir", tmp_path / "run", "--save-steps", 6)
    assert fault.struck >= options.get("times", 1) and are_equal(read_hub(hub), uninterrupted_run)
    assert len([t for t in commit_titles(hub) if t == "Adapter"]) == 1  # a lost reply makes no second commit


@pytest.mark.thorough
def test_a_hub_that_stays_down_costs_the_exit_code_and_nothing_else(train, hub, uninterrupted_run, tmp_path):
    down = hub.faults.add("POST .*/commit/", 503, times=10**6)
    run = tmp_path / "run"
    error = train("--output-dir", run, "--hub-patience", 2, expect=75).error
    assert "not in harbour/seal" in error[0] and str(run / "adapter") in error[1] and "same command" in error[2]
    assert (
        are_equal(load((run / "adapter" / "adapter_model.safetensors").read_bytes()), uninterrupted_run)
        and down.struck > 3
    )
    hub.faults.clear()
    ran = train("--output-dir", run)
    assert "nothing to train" in ran.err and are_equal(read_hub(hub), uninterrupted_run)


def test_a_token_that_may_only_read_is_refused_before_anything_is_spent(train, hub, tmp_path):
    hub.add("models", REPO)
    error = train("--output-dir", tmp_path / "run", env={"HF_TOKEN": READ_ONLY}, expect=2).error
    assert "write" in " ".join(error)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_token_for_one_repository_is_enough_if_that_exists(train, hub, tmp_path):
    env = {"HF_TOKEN": ONE_REPOSITORY}
    error = train("--output-dir", tmp_path / "run", env=env, expect=2).error
    assert "create a repository" in " ".join(error) or "token" in " ".join(error)
    hub.add("models", REPO)
    train("--output-dir", tmp_path / "run", "--max-steps", 3, env=env)
    assert "adapter_model.safetensors" in hub.files(REPO)


def test_a_public_repository_needs_to_be_meant(train, hub, tmp_path):
    hub.add("models", REPO).private = False
    error = train("--output-dir", tmp_path / "run", expect=2).error
    assert "public" in error[0] and "--public" in error[2]
    shown = train("--output-dir", tmp_path / "run", "--public", "--max-steps", 1).err
    assert "anyone" in shown and f"name {tmp_path}" not in shown and f"and {tmp_path / 'run'} of this machine" in shown
    shown = train("--output-dir", tmp_path / "other", "--public", "--max-steps", 1, repo="harbour/open").err
    made = hub.repos["models", "harbour/open"]
    assert not made.private and made.gated == "manual" and "if you approve their request" in shown


def test_a_public_repository_is_never_without_its_gate(train, hub, tmp_path):
    """It is created private; one request makes it public and gated. If that request fails, it stays private."""
    hub.faults.add(f"PUT /api/models/{REPO}/settings", 403)
    train("--output-dir", tmp_path / "run", "--public", "--max-steps", 1, expect=2)
    assert hub.repos["models", REPO].private
    again = train("--output-dir", tmp_path / "run", "--public", "--max-steps", 1)
    assert "exists and is private; --public does not change that" in again.err
    planned = train("--dry-run", "--public", "--output-dir", tmp_path / "b", "--max-steps", 1, repo="harbour/b")
    assert "harbour/b will be created, PUBLIC, gated (manual)" in planned.out
    train("--output-dir", tmp_path / "b", "--public", "--gated", "off", "--max-steps", 1, repo="harbour/b")
    made = hub.repos["models", "harbour/b"]
    assert not made.private and made.gated is False


def test_a_repository_that_another_process_creates_stays_private(train, hub, tmp_path):
    """It is created between the look-up and the request to create it, so its settings are somebody else's."""
    hub.add("models", REPO, {})
    hub.faults.add(f"GET /api/models/{REPO}$", 404, X_Error_Code="RepoNotFound")
    ran = train("--output-dir", tmp_path / "run", "--public", "--max-steps", 1)
    assert hub.repos["models", REPO].private
    assert "exists and is private; --public does not change that" in ran.err


def test_a_lost_reply_to_the_creation_loses_no_setting(train, hub, tmp_path):
    hub.faults.add("POST /api/repos/create", "lost")
    train("--output-dir", tmp_path / "run", "--public", "--max-steps", 1)
    assert not hub.repos["models", REPO].private and hub.repos["models", REPO].gated == "manual"


def damage_newest_checkpoint(hub, how: str, name: str = "checkpoint-12") -> None:
    """Leave the repository as it is after step 12 and before the adapter, with a damage."""
    kept = (".gitattributes", "fresh_start.json")
    hub.put(REPO, {p: None for p in hub.files(REPO) if "/" not in p and p not in kept})
    content = hub.files(REPO)[f"{name}/optimizer.pt"].content
    changes = {
        "none": {},
        "no manifest": {f"{name}/MANIFEST.json": None},
        "no optimizer": {f"{name}/optimizer.pt": None},
        "truncated": {f"{name}/optimizer.pt": content[: len(content) // 2]},
        "bit flip": {f"{name}/optimizer.pt": content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]},
        "empty": {p: None for p in hub.files(REPO) if p.startswith(f"{name}/") and not p.endswith("config.json")},
    }
    hub.put(REPO, changes[how])


@pytest.mark.parametrize("how", ["no manifest", "no optimizer", "truncated", "bit flip", "empty"])
@pytest.mark.thorough
def test_a_damaged_checkpoint_on_the_hub_is_passed_over(train, hub, uninterrupted_run, tmp_path, how):
    train("--output-dir", tmp_path / "one", "--save-steps", 6)
    damage_newest_checkpoint(hub, how)
    ran = train("--output-dir", tmp_path / "two", "--save-steps", 6)
    assert "checkpoint-12 in harbour/seal is left out" in ran.err and "continuing from step 6" in ran.err
    assert are_equal(read_hub(hub), uninterrupted_run) and logged_steps(tmp_path / "two") == list(range(13))


def test_when_none_is_whole_it_stops_loudly(train, hub, tmp_path):
    train("--output-dir", tmp_path / "one")
    for name in checkpoints(hub):
        damage_newest_checkpoint(hub, "no optimizer", name)
    before = commit_titles(hub)
    error = train("--output-dir", tmp_path / "two", expect=1).error
    assert "checkpoints in harbour/seal is whole" in error[0] and "--fresh-start" in error[2]
    assert commit_titles(hub) == before


@pytest.mark.parametrize(
    ("match", "kind", "times"),
    [
        ("GET /api/models/harbour/seal$", 503, 2),
        ("GET .*/tree/", "drop", 1),
        ("HEAD .*/resolve/", 503, 2),
        ("GET /cdn/", 503, 1),
        ("GET /cdn/", "truncate", 1),
        ("GET /cdn/", "corrupt", 1),
    ],
)
@pytest.mark.thorough
def test_a_restore_outlives_a_fault(train, hub, uninterrupted_run, tmp_path, match, kind, times):
    train("--output-dir", tmp_path / "one")
    damage_newest_checkpoint(hub, "none")
    fault = hub.faults.add(match, kind, times=times)
    ran = train("--output-dir", tmp_path / "two")
    assert (
        fault.struck >= times and "continuing from step 12" in ran.err and are_equal(read_hub(hub), uninterrupted_run)
    )


@pytest.mark.parametrize(
    ("match", "kind", "code"), [("GET .*/tree/", 503, 75), ("HEAD .*/resolve/", 500, 75), ("GET /api/models/", 403, 2)]
)
@pytest.mark.thorough
def test_an_error_is_never_no_checkpoint(train, hub, tmp_path, match, kind, code):
    train("--output-dir", tmp_path / "one")
    damage_newest_checkpoint(hub, "none")
    before = commit_titles(hub)
    hub.faults.add(match, kind, times=10**6)
    ran = train("--output-dir", tmp_path / "two", "--hub-patience", 1, expect=code)
    assert len(ran.error) == 3 and commit_titles(hub) == before and "base folder" not in ran.err


def test_two_different_runs_do_not_mix(train, hub, tmp_path):
    train("--output-dir", tmp_path / "one", "--max-steps", 3)
    train("--output-dir", tmp_path / "other", "--max-steps", 3, repo=None)
    error = train("--output-dir", tmp_path / "other", "--max-steps", 3, expect=2).error
    assert "two different runs" in error[0]


def test_a_run_that_began_without_the_hub_can_move_there(train, hub, uninterrupted_run, tmp_path):
    train("--output-dir", tmp_path / "whole", "--max-steps", 12)
    assert are_equal(read_hub(hub), uninterrupted_run)


def test_another_command_is_refused_and_a_change_can_be_allowed(train, hub, tmp_path):
    train("--output-dir", tmp_path / "one", "--max-steps", 6)
    error = train("--output-dir", tmp_path / "two", "--learning-rate", 0.02, expect=2).error
    assert "learning_rate was 0.01, is 0.02" in error[1] and "max_steps was 6, is 12" in error[1]
    error = train("--output-dir", tmp_path / "two", "--allow-change", "learning_rat", expect=2).error
    assert "learning_rate" in error[2]
    assert (
        "cannot be resumed" in train("--output-dir", tmp_path / "two", "--allow-change", "lora_rank", expect=2).error[1]
    )
    allowed = ["--allow-change", "max_steps", "--allow-change", "learning_rate"]
    ran = train("--output-dir", tmp_path / "two", "--learning-rate", 0.02, *allowed)
    assert "continuing from step 6 of 12" in ran.err and logged_steps(tmp_path / "two") == list(range(13))
    rates = [json.loads(x).get("learning_rate") for x in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.02)
    plan = get_cosine_schedule_with_warmup(optimizer, 0, 12).lr_lambdas[0]
    assert rates[7:] == pytest.approx([0.02 * plan(step - 1) for step in range(7, 13)])  # the new plan, from there on


@pytest.mark.thorough
def test_a_fresh_start_wipes_once_and_a_resubmission_goes_on(train, start, asked, hub, uninterrupted_run, tmp_path):
    train("--output-dir", tmp_path / "old", "--max-steps", 6)
    old = json.loads((tmp_path / "old" / "run.json").read_text())["run_id"]
    env = {"HF_TOKEN": TOKEN, "FORCE_FRESH_START": "1"}
    process = start(
        *asked, *IN_TWOS, "--hub-model-id", REPO, "--output-dir", tmp_path / "one", env=env, prelude=slowly()
    )
    process.until(lambda: "Step 4" in commit_titles(hub)[commit_titles(hub).index("Adapter") :])
    os.kill(process.pid, signal.SIGKILL)
    ran = process.ended()
    assert "a fresh start deletes checkpoint-6, checkpoint-3" in ran.err
    wiped = next(c for c in hub.repos["models", REPO].commits if c.title.startswith("Fresh start"))
    assert not [p for p in wiped.files if p.startswith("checkpoint-")] and "fresh_start.json" in wiped.files
    # nor is the old adapter left under the new run's card
    assert not {"adapter_model.safetensors", "run.json", "report.html", "metrics.jsonl"} & wiped.files.keys()
    ran = train("--output-dir", tmp_path / "two", "--save-steps", 2, env=env)
    assert "continuing it" in ran.err and "continuing from step" in ran.err
    assert commit_titles(hub).count(wiped.title) == 1 and are_equal(read_hub(hub), uninterrupted_run)
    new = json.loads((tmp_path / "two" / "run.json").read_text())["run_id"]
    assert new != old and new == json.loads((tmp_path / "one" / "run.json").read_text())["run_id"]
    # once it is done, the variable means what it says again
    train("--output-dir", tmp_path / "three", "--save-steps", 2, env=env)
    assert commit_titles(hub).count(wiped.title) == 2 and are_equal(read_hub(hub), uninterrupted_run)


@pytest.mark.thorough
def test_a_fresh_start_that_is_cut_off_begins_again(train, hub, uninterrupted_run, tmp_path):
    train("--output-dir", tmp_path / "old", "--max-steps", 6)
    hub.faults.add("POST .*/commit/", "lost")
    train("--output-dir", tmp_path / "one", "--fresh-start")
    assert sum(t.startswith("Fresh start") for t in commit_titles(hub)) == 1 and are_equal(
        read_hub(hub), uninterrupted_run
    )


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.thorough
def test_a_checkpoint_of_plain_trainer_is_accepted_with_a_warning(train, hub, tmp_path, tiny_llama, last):
    plain = plain_trainer(tmp_path, tiny_llama)
    name = "last-checkpoint" if last else "checkpoint-4"
    files = {f"{name}/{p.name}": p.read_bytes() for p in plain.iterdir() if p.is_file()}
    assert f"{name}/training_args.bin" in files
    hub.add("models", REPO, files)
    ran = train("--output-dir", tmp_path / "run", "--max-steps", 8)
    assert "made by plain Trainer" in ran.err and "continuing from step 4 of 8" in ran.err
    assert not list((tmp_path / "run").rglob("training_args.bin"))
    assert not any("/resolve/" in path and path.endswith("training_args.bin") for _, path in hub.log)
    # and from a folder
    local = tmp_path / "local"
    shutil.copytree(plain, local / "checkpoint-4")
    assert "continuing from step 4 of 8" in train("--output-dir", local, "--max-steps", 8, repo=None).err
    # with another optimizer it cannot be resumed, and what is said is not that it lacks a manifest
    other = tmp_path / "other"
    shutil.copytree(plain, other / "checkpoint-4")
    state = torch.load(other / "checkpoint-4" / "optimizer.pt", weights_only=True)
    state["state"] = {name: {"step": 4, "state1": torch.zeros(2)} for name in state["state"]}
    torch.save(state, other / "checkpoint-4" / "optimizer.pt")
    refused = train("--output-dir", other, "--max-steps", 8, repo=None, expect=1).error
    assert "plain Trainer" in refused[0] and "not torch's AdamW" in refused[1] and "--fresh-start" in refused[2]
    # and not when a part is missing, which plain Trainer would not notice
    hub.put(REPO, {p: None for p in hub.files(REPO) if not p.startswith(name)})
    hub.put(REPO, {f"{name}/optimizer.pt": None})
    error = train("--output-dir", tmp_path / "again", "--max-steps", 8, expect=1).error
    assert "optimizer.pt is missing" in error[1]


def plain_trainer(tmp_path, base):
    """checkpoint-4 as transformers' own Trainer leaves it."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from phoque.models.architectures.base import LLAMA_PROJECTIONS

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=16, lora_alpha=64, target_modules=LLAMA_PROJECTIONS, task_type="CAUSAL_LM"),
    )
    data = Dataset.from_list([{"input_ids": list(range(9)), "labels": list(range(9))}] * 16)
    arguments = TrainingArguments(
        str(tmp_path / "plain"),
        max_steps=8,
        save_steps=4,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        optim="adamw_torch",
    )
    Trainer(model, arguments, train_dataset=data).train()
    return tmp_path / "plain" / "checkpoint-4"


@pytest.mark.thorough
def test_sigterm_while_it_pushes_saves_pushes_and_exits_75(start, train, asked, hub, uninterrupted_run, tmp_path):
    hub.faults.add("POST .*/commit/", "slow", times=100, seconds=0.6)
    process = start(
        *asked,
        "--hub-model-id",
        REPO,
        "--output-dir",
        tmp_path / "one",
        "--save-steps",
        1,
        env={"HF_TOKEN": TOKEN},
        prelude=slowly(),
    )
    process.until(lambda: ("POST", "api/models/harbour/seal/commit/main") in hub.log)
    os.kill(process.pid, signal.SIGTERM)
    ran = process.ended()
    step = int(re.search(r"Stopped after step (\d+) of 12", ran.error[0])[1])
    assert ran.code == 75 and f"{REPO} has checkpoint-{step}." in ran.error[1]
    assert f"checkpoint-{step}" in checkpoints(hub)
    hub.faults.clear()
    train("--output-dir", tmp_path / "two", "--save-steps", 1)
    assert are_equal(read_hub(hub), uninterrupted_run)


@pytest.mark.thorough
def test_if_pushes_are_slower_than_saves_the_newest_wins_and_the_last_goes(train, hub, uninterrupted_run, tmp_path):
    hub.faults.add("POST .*/commit/", "slow", times=100, seconds=0.7)
    train("--output-dir", tmp_path / "run", "--save-steps", 1)
    pushed = [int(t.split()[1]) for t in commit_titles(hub) if t.startswith("Step")]
    assert (
        len(pushed) < 12
        and pushed[-1] == 12
        and pushed == sorted(pushed)
        and are_equal(read_hub(hub), uninterrupted_run)
    )


def test_more_saves_than_the_hub_takes_commits_is_a_warning(train, hub, tmp_path):
    ran = train("--output-dir", tmp_path / "run", "--save-steps", 1, "--max-steps", 3)
    assert "128 commits per hour" in ran.err


def test_no_token_is_an_error_that_says_so(phoque, asked):
    error = phoque(*asked, "--hub-model-id", REPO, expect=2).error
    assert "no Hub token" in error[0] and "HF_TOKEN" in error[2]


def test_the_run_that_is_begun_elsewhere_is_shown_in_a_dry_run_that_only_reads(train, hub, tmp_path):
    train("--output-dir", tmp_path / "one", "--max-steps", 6)
    damage_newest_checkpoint(hub, "none", "checkpoint-6")
    hub.log.clear()
    facts = train("--output-dir", tmp_path / "two", "--max-steps", 6, "--dry-run", "--json").json["facts"]
    assert "private" in facts["Hub repository"] and "checkpoint-6" in facts["Hub repository"]
    assert {command for command, _ in hub.log} <= {"GET", "HEAD"} and not (tmp_path / "two").exists()
    facts = train("--dry-run", "--json", repo="harbour/new").json["facts"]
    assert "will be created, private" in facts["Hub repository"]
    assert {command for command, _ in hub.log} <= {"GET", "HEAD"}


@pytest.mark.alone
def test_a_deadline_is_kept(train, hub, uninterrupted_run, tmp_path, asked):
    write_rows(tmp_path / "many.jsonl", [row(n) for n in range(400)])
    more = ["--dataset", tmp_path / "many.jsonl", "--max-steps", 5000, "--save-steps", 50, "--timeout", "8s"]
    ran = train("--output-dir", tmp_path / "run", *more, expect=75, prelude=slowly(0.01))
    step = int(re.search(r"after step (\d+) of 5000", ran.error[0])[1])
    assert "to the deadline" in ran.err and f"{REPO} has checkpoint-{step}." in ran.error[1] and step > 0


def test_no_token_shows_anywhere(train, hub, tmp_path):
    hub.faults.add("POST .*/commit/", 503, times=2)
    env = {"WANDB_API_KEY": "g" * 40, "WANDB_MODE": "offline", "HF_TOKEN": TOKEN}
    ran = train("--output-dir", tmp_path / "run", env=env)
    failed = train("--output-dir", tmp_path / "no", "--hub-patience", 0, env={"HF_TOKEN": "hf_gullgull"}, expect=2)
    for secret in (TOKEN, "g" * 40, "hf_gullgull"):
        assert secret not in ran.out + ran.err + failed.out + failed.err
        assert not [p for p in tmp_path.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()]
        assert not [name for name, content in hub.contents().items() if secret.encode() in content]
    assert hub.cdn_tokens == []


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.thorough
def test_merged_models_are_pushed_at_the_end_and_at_each_save(train, hub, tmp_path, each):
    env = {"EXPORT_MERGED_MODEL": "1"} | ({"EXPORT_INFERENCE_ON_SAVE": "1"} if each else {})
    ran = train("--output-dir", tmp_path / "run", "--save-steps", 6, "--json", env=env)
    repo = hub.repos["models", "harbour/seal-merged"]
    assert repo.private and ran.json["merged_repo"] == "harbour/seal-merged" and ran.json["proof"]["holds"]
    expected = ["Merged model of step 6"] if each else []
    assert [c.title for c in repo.commits][1:] == [*expected, "Merged model"]
    content = hub.files("harbour/seal-merged")["model.safetensors"].content
    assert content == (tmp_path / "run" / "merged" / "model.safetensors").read_bytes()
    if each:
        assert repo.commits[1].files["model.safetensors"].content != content
        assert not (tmp_path / "run" / ".merged").exists()
    again = train("--output-dir", tmp_path / "run", "--save-steps", 6, "--json", env=env)  # nothing is done twice
    assert "nothing to do" in again.err and [c.title for c in repo.commits][1:] == [*expected, "Merged model"]


def test_a_merged_model_that_cannot_be_pushed_is_said_to_be_here(train, hub, tmp_path):
    hub.faults.add("POST /api/models/harbour/seal-merged/commit", 503, times=10**6)
    env = {"EXPORT_MERGED_MODEL": "1"}
    error = train("--output-dir", tmp_path / "run", "--hub-patience", 2, expect=75, env=env).error
    assert (
        "not pushed to harbour/seal-merged" in error[0]
        and (tmp_path / "run" / "merged" / "model.safetensors").is_file()
    )
    hub.faults.clear()
    train("--output-dir", tmp_path / "run", env=env)
    assert "model.safetensors" in hub.files("harbour/seal-merged")


@pytest.mark.thorough
def test_a_later_attempt_of_the_submission_that_finished_does_not_begin_again(train, hub, uninterrupted_run, tmp_path):
    env = {"FORCE_FRESH_START": "1", "JOB_ID": "a1"}
    train("--output-dir", tmp_path / "one", env=env)
    before = commit_titles(hub)
    assert "nothing to train" in train("--output-dir", tmp_path / "two", env=env).err
    assert commit_titles(hub)[: len(before)] == before
    assert sum(t.startswith("Fresh start") for t in commit_titles(hub)) == 1 and are_equal(
        read_hub(hub), uninterrupted_run
    )
    train("--output-dir", tmp_path / "three", env=env | {"JOB_ID": "b2"})
    assert sum(t.startswith("Fresh start") for t in commit_titles(hub)) == 2


def test_data_that_changed_under_a_fresh_start_is_read_as_it_was(train, hub, tmp_path, rows):
    hub.add("datasets", "harbour/gulls", {"train.jsonl": rows.read_bytes()})
    more, env = ["--dataset", "harbour/gulls"], {"FORCE_FRESH_START": "1"}
    train("--output-dir", tmp_path / "one", *more, env=env)
    damage_newest_checkpoint(hub, "none")
    hub.put("harbour/gulls", {"train.jsonl": rows.read_bytes() + rows.read_bytes()}, "datasets")
    before = checkpoints(hub)
    again = train("--output-dir", tmp_path / "three", *more, env=env)
    assert "has newer commits" in again.err and "continuing it" in again.err
    assert checkpoints(hub) == before


def test_an_older_job_may_not_push_into_a_fresh_start(train, start, asked, hub, tmp_path):
    process = start(
        *asked,
        *IN_TWOS,
        "--hub-model-id",
        REPO,
        "--output-dir",
        tmp_path / "old",
        env={"HF_TOKEN": TOKEN},
        prelude=slowly(),
    )
    process.until(lambda: "Step 2" in commit_titles(hub))
    gone = {p: None for p in hub.files(REPO) if p.startswith("checkpoint-")}
    marker = {"id": "new", "at": "now", "asked": {}, "submission": ""}
    hub.put(REPO, gone | {"fresh_start.json": json.dumps(marker).encode()})
    ran = process.ended()
    assert ran.code == 2 and "restarted by another run" in ran.error[0] and not checkpoints(hub)


def test_a_save_before_an_error_still_reaches_the_hub(train, hub, tmp_path):
    hub.faults.add("POST .*/commit/", "slow", times=9, seconds=0.5)
    ran = train("--output-dir", tmp_path / "run", "--save-steps", 1, "--learning-rate", 1e20, expect=1)
    assert "waiting for the last checkpoint" in ran.err, ran.err
    local = {p.name for p in (tmp_path / "run").glob("checkpoint-*")}
    assert local and max(local) in checkpoints(hub), (ran.err, commit_titles(hub))


def test_a_separator_inside_a_text_is_no_line_end(train, tmp_path, hub):
    odd = [row(n) for n in range(40)]
    for one in odd:
        one["messages"][1]["content"] += "\u2028and\x85more?"
    write_rows(tmp_path / "odd.jsonl", odd)
    more = ["--dataset", tmp_path / "odd.jsonl", "--sample-every", 1, "--sample-tokens", 4, "--max-steps", 3]
    train("--output-dir", tmp_path / "one", *more)
    damage_newest_checkpoint(hub, "none", "checkpoint-3")
    train("--output-dir", tmp_path / "two", *more)


def test_a_card_names_no_folder_as_its_base(train, hub, tmp_path):
    train("--output-dir", tmp_path / "run", "--max-steps", 1)
    assert "base_model:" not in hub.files(REPO)["README.md"].content.decode()  # a folder, which the Hub would refuse


def test_the_history_is_squashed_if_that_is_asked_for(train, hub, tmp_path):
    train("--output-dir", tmp_path / "run", "--squash-history")
    repo = hub.repos["models", REPO]
    assert commit_titles(hub) == ["Adapter"] and "adapter_model.safetensors" in repo.commits[-1].files
    again = train("--output-dir", tmp_path / "elsewhere")
    assert "nothing to train" in again.err


def test_a_fresh_start_with_yes_starts_again_outside_of_a_job(train, tmp_path):
    run = tmp_path / "run"
    train("--output-dir", run, "--fresh-start", "--yes", repo=None)
    first = json.loads((run / "run.json").read_text())
    record = {name: value for name, value in first.items() if name != "result"}  # as if it had been killed
    (run / "run.json").write_text(json.dumps(record))
    ran = train("--output-dir", run, "--fresh-start", repo=None)
    assert "continuing it (outside of a Job, --yes starts again)" in ran.err
    (run / "run.json").write_text(json.dumps(record))
    ran = train("--output-dir", run, "--fresh-start", "--yes", repo=None)
    assert "a fresh start deletes" in ran.err and "continuing" not in ran.err
    assert json.loads((run / "run.json").read_text())["fresh_start"]["id"] != first["fresh_start"]["id"]

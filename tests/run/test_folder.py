"""What a start does with the run folder that it finds, without a model."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from asd_megatron.checkpoint import lineage
from asd_megatron.config import load_recipe
from asd_megatron.errors import UserError
from asd_megatron.files import remove_folder
from asd_megatron.run.folder import Kind, Start, claim, prepare, writing
from asd_megatron.run.history import changes_of, read_history, record
from asd_megatron.run.preview import finished_text
from tests.run.starts import begin, checkpoint, complete, contents, recipe, refusal

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "run"


# -------------------------------------------------------------------- what is found


@pytest.mark.parametrize(
    ("found", "overrides", "kind"),
    [
        ([], [], "fresh"),
        (["attempt"], [], "restart"),
        (["attempt"], ["--run.steps", "9"], "restart"),
        (["attempt"], ["--run.overwrite", "true"], "overwrite"),
        (["attempt"], ["--run.overwrite", "true", "--checkpoint.resume", "never"], "overwrite"),
        (["attempt", "checkpoint"], [], "resume"),
        (["attempt", "checkpoint"], ["--run.overwrite", "true"], "resume"),
        (["attempt", "checkpoint"], ["--run.overwrite", "true", "--checkpoint.resume", "never"], "overwrite"),
        (["attempt", "complete"], [], "finished"),
        (["attempt", "checkpoint", "complete"], [], "finished"),
        (["attempt", "checkpoint", "complete"], ["--run.steps", "9"], "resume"),
        (["attempt", "checkpoint", "complete"], ["--run.overwrite", "true"], "overwrite"),
        (["attempt", "complete"], ["--run.overwrite", "true"], "overwrite"),
    ],
)
def test_a_start_does_what_is_left(folder: Path, found: list[str], overrides: list[str], kind: Kind) -> None:
    if "attempt" in found:
        begin(folder)
    if "checkpoint" in found:
        checkpoint(folder, 3)
    if "complete" in found:
        complete(folder)
    start = begin(folder, *overrides)
    assert start.kind == kind
    assert start.checkpoint == (str(folder / "checkpoints" / "step_000003") if kind == "resume" else None)
    assert (folder / "summary.json").exists() == (kind == "finished")
    assert (folder / "checkpoints" / "step_000003").exists() == ("checkpoint" in found and kind != "overwrite")


def test_the_export_of_the_last_step_is_made_if_a_kill_cut_it_off(folder: Path) -> None:
    export = ["--checkpoint.export_at_end", "true"]
    begin(folder, *export)
    checkpoint(folder, 6)
    partial = folder / "hf" / ".step_000006.1f.partial"
    partial.mkdir(parents=True)
    assert begin(folder, *export).kind == "resume"
    assert not partial.exists()
    complete(folder)
    before = contents(folder)
    assert begin(folder, *export, "--optimizer.learning_rate", "0.5").kind == "resume"
    del before[str(folder / "history.jsonl")]
    assert before.items() <= contents(folder).items()  # recipe and summary say what trained it
    (folder / "hf" / "step_000006").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / "hf" / "step_000006" / name).touch()
    assert begin(folder, *export).kind == "finished"


def test_an_attempt_is_replaced_and_its_exports_are_kept(folder: Path) -> None:
    begin(folder)
    for name in ("rollouts/step_000001.parquet", "tensorboard/events", "hf/step_000001/config.json", "curves.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    assert begin(folder).kind == "restart"
    assert sorted(p.name for p in folder.iterdir()) == ["hf", "history.jsonl", "metrics.jsonl", "recipe.yaml"]
    assert [event["event"] for event in read_history(folder)] == ["fresh", "restart"]


@pytest.mark.parametrize("history", ["", '{"event": "fresh", "step": 0, "stage": "train"}\n'])
def test_a_start_that_could_not_record_itself_is_made_again(folder: Path, history: str) -> None:
    """The disk was full: there is no recipe yet, nor a file that was being written."""
    folder.mkdir(parents=True)
    (folder / ".recipe.yaml.0f3a9c2b7d11.partial").touch()
    assert begin(folder).kind == "fresh"
    (folder / "recipe.yaml").unlink()
    (folder / "history.jsonl").write_text(history)
    assert begin(folder).kind == "restart"
    assert not list(folder.glob(".recipe*"))


def test_a_run_that_ended_without_a_checkpoint_is_not_thrown_away(folder: Path) -> None:
    begin(folder)
    complete(folder, steps=4)
    assert "run.overwrite true" in refusal(folder)


def test_other_folders_are_left_alone(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("model: {path: /models/m}\n")  # a user's own, in a folder of theirs
    message = refusal(folder)
    assert "not empty" in message and "run.overwrite true" in message
    (folder / "recipe.yaml").rename(folder / "thesis.tex")
    assert "no run folder" in refusal(folder, "--run.overwrite", "true")


def test_a_run_of_the_other_stage(folder: Path) -> None:
    begin(folder)
    checkpoint(folder, 3)
    assert "asd-megatron train" in refusal(folder, stage="sft")


def test_a_finished_run_says_where_its_results_are(folder: Path) -> None:
    begin(folder)
    complete(folder)
    (folder / "curves.png").touch()
    start = begin(folder, "--optimizer.learning_rate", "0.5")
    text = finished_text(recipe(folder), start.changes)
    for words in ("after 6 steps", "nothing is left to do", "model: none", f"summary: {folder / 'summary.json'}"):
        assert words in " ".join(text.split()), text
    assert f"curves:  {folder / 'curves.png'}" in text and "optimizer.learning_rate: 1e-06 -> 0.5" in text
    (folder / "hf" / "step_000006").mkdir(parents=True)
    text = finished_text(recipe(folder), ())
    assert f"model:   {folder / 'hf' / 'step_000006'}" in text and "ignored" not in text


# -------------------------------------------------------------------- from another run's checkpoint


def test_a_start_from_another_run_resumes_its_own_checkpoints_later(folder: Path, tmp_path: Path) -> None:
    given = checkpoint(tmp_path / "other", 2)
    first = ["--checkpoint.resume", str(given)]
    assert begin(folder, *first) == Start("fresh", str(given))
    assert begin(folder, *first) == Start("restart", str(given))
    own = checkpoint(folder, 3)
    assert begin(folder, *first) == Start("resume", str(own))
    complete(folder)
    assert begin(folder, *first).kind == "finished"
    checkpoint(folder, 6)
    # another origin is another run
    assert "not empty" in refusal(folder, "--checkpoint.resume", str(checkpoint(tmp_path / "third", 2)))
    assert begin(folder, "--checkpoint.resume", str(own)).kind == "resume"  # back to a checkpoint of its own


def test_a_checkpoint_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    assert "is not a folder" in refusal(folder, "--checkpoint.resume", str(tmp_path / "none"))
    assert not folder.parent.exists()


# -------------------------------------------------------------------- back to a checkpoint of its own


def test_the_command_that_returned_to_a_checkpoint_goes_on_when_it_is_started_again(folder: Path) -> None:
    begin(folder)
    older, _ = checkpoint(folder, 2), checkpoint(folder, 4)
    back = ["--checkpoint.resume", str(older)]
    for _ in range(2):  # killed before it saved
        assert begin(folder, *back) == Start("resume", str(older))
    newer = checkpoint(folder, 3)
    assert begin(folder, *back) == Start("resume", str(newer), returned_to=str(older))
    assert begin(folder) == Start("resume", str(newer))
    remove_folder(older)  # pruned
    assert begin(folder, *back) == Start("resume", str(newer), returned_to=str(older))
    newest = checkpoint(folder, 6)
    complete(folder)
    assert begin(folder, *back).kind == "finished"
    assert begin(folder, *back, "--run.steps", "9").checkpoint == str(newest)
    assert [(event["step"], event.get("returned")) for event in read_history(folder) if event["event"] == "resume"] == [
        *[(2, True)] * 2,
        *[(3, None)] * 3,
        (6, None),
    ]


def test_a_complete_run_whose_own_checkpoint_is_named_is_not_overwritten(folder: Path) -> None:
    begin(folder)
    older, newest = checkpoint(folder, 3), checkpoint(folder, 6)
    complete(folder)
    overwrite = ["--run.overwrite", "true", "--checkpoint.resume"]
    assert begin(folder, *overwrite, str(newest)).kind == "finished"
    assert begin(folder, *overwrite, str(newest), "--run.steps", "9").checkpoint == str(newest)
    complete(folder)
    assert begin(folder, *overwrite, str(older)).checkpoint == str(older)
    lineage.name_latest(folder / "checkpoints", newest.name)  # saved again
    complete(folder)
    assert begin(folder, *overwrite, str(older)).kind == "finished"  # the same command again
    assert "settings" in refusal(folder, *overwrite, str(older), "--run.seed", "1")
    assert begin(folder, *overwrite, "never").kind == "overwrite"


def test_a_resume_that_nobody_asked_for_and_an_abandoned_branch_are_no_returns(folder: Path) -> None:
    begin(folder)
    first, second = checkpoint(folder, 2), checkpoint(folder, 3)
    assert begin(folder) == Start("resume", str(second))
    checkpoint(folder, 4)
    back = ["--checkpoint.resume", str(second)]
    assert begin(folder, *back) == Start("resume", str(second))  # it was resumed, but not returned to
    assert begin(folder, "--checkpoint.resume", str(first)) == Start("resume", str(first))
    remove_folder(second)
    assert "is not a folder" in refusal(folder, *back)  # it was of the branch that was left
    checkpoint(folder, 3)
    checkpoint(folder, 5)
    assert begin(folder, *back) == Start("resume", str(second))


# -------------------------------------------------------------------- changed settings


@pytest.mark.parametrize(
    "change",
    [
        ["--algorithm.name", "grpo"],
        ["--gate.tau_down", "0.9"],
        ["--privileged.exclude_self", "false"],
        ["--model.path", "/models/other"],
        ["--model.dtype", "float32"],
        ["--data.train", "other.jsonl"],
        ["--reward.name", "exact"],
        ["--run.seed", "1"],
        ["--sampling.problems_per_step", "16"],
        ["--sampling.temperature", "0.7"],
        ["--rollout.replay_folder", "/dumps"],
        ["--optimizer.beta2", "0.95"],
        ["--evaluation.samples", "4"],
    ],
)
def test_a_change_that_falsifies_the_record_needs_consent(folder: Path, change: list[str]) -> None:
    key, value = change[0][2:], change[1]
    replay = ["--rollout.engine", "replay"] if key == "rollout.replay_folder" else []
    begin(folder, *replay, *(["--rollout.replay_folder", "/others"] if replay else []))
    checkpoint(folder, 3)
    message = refusal(folder, *replay, *change)
    assert f"{key}: " in message and value in message and f"checkpoint.accept_changes [{key}]" in message
    start = begin(folder, *replay, *change, "--checkpoint.accept_changes", key)
    assert [c.key for c in start.changes] == [key]
    (event,) = changes_of(folder)
    assert (event["step"], event["key"], str(event["new"]).lower()) == (3, key, value)
    assert read_recorded(folder, key) == event["new"]
    assert begin(folder, *replay, *change).changes == ()  # recorded once


@pytest.mark.parametrize("left", ["attempt", "complete"])
def test_a_change_without_a_checkpoint_needs_consent_too(folder: Path, left: str) -> None:
    """A finished run's record keeps the settings that trained it."""
    begin(folder)
    if left == "complete":
        complete(folder)
    change = ["--sampling.temperature", "0.7"]
    assert "sampling.temperature: 1" in refusal(folder, *change)
    assert "sampling.temperature: 1" in refusal(folder, *change, "--checkpoint.accept_changes", "[run.seed]")
    begin(folder, *change, "--checkpoint.accept_changes", "all")
    assert read_recorded(folder, "sampling.temperature") == (0.7 if left == "attempt" else 1.0)
    assert [event["event"] for event in read_history(folder)][1:] == (
        ["restart", "change"] if left == "attempt" else []
    )
    assert changes_of(folder) == []  # nothing was trained with the other setting


def read_recorded(folder: Path, key: str) -> Any:
    section, _, name = key.partition(".")
    return load_recipe(folder / "recipe.yaml").model_dump(mode="json")[section][name]


def test_free_changes_pass_and_are_recorded(folder: Path) -> None:
    free = {
        "run.steps": "9",
        "optimizer.learning_rate": "0.5",
        "optimizer.schedule": "linear",
        "algorithm.updates_per_batch": "2",
        "parallelism.tensor": "2",
        "batching.tokens_per_microbatch": "64",
        "rollout.max_batch_size": "3",
        "reward.workers": "1",
        "checkpoint.keep": "5",
    }
    begin(folder)
    checkpoint(folder, 3)
    start = begin(folder, *(text for key, value in free.items() for text in (f"--{key}", value)))
    assert start.kind == "resume" and {c.key for c in start.changes} == set(free)
    assert {event["key"]: str(event["new"]) for event in changes_of(folder)} == free


def test_keys_that_the_schema_has_gained_count_with_their_defaults(folder: Path) -> None:
    begin(folder)
    checkpoint(folder, 3)
    lines = (folder / "recipe.yaml").read_text().splitlines()
    kept = [line for line in lines if "lambda_max:" not in line and "server_urls:" not in line]
    (folder / "recipe.yaml").write_text("\n".join(kept) + "\n  gone: 1\n")
    assert begin(folder).changes == ()
    text = (folder / "recipe.yaml").read_text()
    before, _, after = text.partition("\nperplexity:\n")  # a section of which older records know nothing
    (folder / "recipe.yaml").write_text(before + after[after.index("\nprivileged:") :])
    assert begin(folder).changes == ()


def test_records_nested_too_deeply_count_as_damaged(folder: Path) -> None:
    begin(folder)
    deep = "[" * 100_000 + "]" * 100_000
    (folder / "summary.json").write_text(deep)
    with (folder / "history.jsonl").open("a") as file:
        file.write(deep + "\n")
    assert begin(folder).kind == "restart"
    assert [event["event"] for event in read_history(folder)] == ["fresh", "restart"]


def test_a_torn_line_of_the_history_is_left_behind(folder: Path) -> None:
    folder.mkdir(parents=True)
    record(folder, "fresh", 0)
    with (folder / "history.jsonl").open("a") as file:
        file.write('{"event": "resu')
    record(folder, "resume", 3)
    assert [event["event"] for event in read_history(folder)] == ["fresh", "resume"]


# -------------------------------------------------------------------- the lock


@pytest.fixture
def other_run(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    code = (
        "from contextlib import ExitStack; from pathlib import Path; from asd_megatron.run.folder import hold\n"
        f"with ExitStack() as closing: hold(Path({str(folder)!r}), closing); print('held', flush=True); input()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_while_the_first_lives(folder: Path, other_run: subprocess.Popen[str]) -> None:
    (folder / "recipe.yaml").touch()
    for overrides in ([], ["--run.overwrite", "true"], ["--run.overwrite", "true", "--checkpoint.resume", "never"]):
        message = refusal(folder, *overrides)
        assert f"process {other_run.pid} on {os.uname().nodename} since " in message
        assert "run.name" in message
    (folder / "recipe.yaml").unlink()
    other_run.kill()  # a dead holder blocks nobody, although its file is still there
    other_run.wait()
    assert (folder / ".lock").is_file()
    assert begin(folder).kind == "fresh"
    assert not (folder / ".lock").exists()


def test_the_lock_outlives_overwriting(folder: Path) -> None:
    begin(folder)
    asked = recipe(folder, "--run.overwrite", "true")
    with ExitStack() as closing:
        prepare(asked, claim(asked, "train", closing), "train", 0)
        assert "in use" in refusal(folder, "--run.overwrite", "true")


# -------------------------------------------------------------------- the operating system


@pytest.mark.parametrize("case", ["file", "below a file", "name", "null"])
def test_a_folder_that_cannot_be_made(tmp_path: Path, case: str) -> None:
    (tmp_path / "file").touch()
    path = {"file": "file", "below a file": "file/run", "name": "n" * 300, "null": "a\0b"}[case]
    with pytest.raises(UserError) as caught, ExitStack() as closing:
        claim(recipe(tmp_path / path), "train", closing)
    message = str(caught.value)
    assert "cannot be made (" in message and "choose another run.name or run.folder" in message
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_is_the_users_to_solve(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot be written .No space left on device.: free space"):
        begin(folder)


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.EDQUOT, "free space there"), (errno.EROFS, "make it writable"), (errno.ENOENT, "put")]
)
def test_the_remedy_is_that_of_what_was_refused(number: int, remedy: str) -> None:
    told = rf"^run cannot be written \({os.strerror(number)}\): {remedy}.*, then start the same command again$"
    with pytest.raises(UserError, match=told), writing(Path("run")):
        raise OSError(number, os.strerror(number))


def test_what_is_refused_leaves_no_folder(folder: Path) -> None:
    with ExitStack() as closing:
        claim(recipe(folder), "train", closing)
        assert json.dumps(os.listdir(folder)) == '[".lock"]'
    assert not folder.parent.exists()

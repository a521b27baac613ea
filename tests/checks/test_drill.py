from __future__ import annotations

import json
from pathlib import Path

import pytest

from asd_megatron.checks.drill import drill
from asd_megatron.checks.drill.disturbance import Verdict
from asd_megatron.checks.drill.drill import BEGIN, END
from asd_megatron.checks.drill.fault import Fault, NotPossible
from asd_megatron.checks.drill.sabotage import Sabotage
from asd_megatron.checks.drill.world import World as DrillWorld
from asd_megatron.checks.drill.world import newest
from asd_megatron.checks.ranks import CheckError
from asd_megatron.cli.main import main
from tests.distributed.harness import RankError, run_ranks
from tests.e2e.world import ROOT, World, make_world, steps


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path / "world")


def _sabotaged(rank: int, argv: list[str], fault: Sabotage) -> int:
    from asd_megatron import train
    from asd_megatron.checks.drill import sabotage

    sabotage.install(fault)
    return train.main(argv)


def test_the_moments_of_a_fault(world: World, tmp_path: Path) -> None:
    """Each phase of the step that is meant, on the rank that is meant, once."""
    recipe = world.recipe(parallelism={"tensor": 2}, checkpoint={"every": 1}, run={"steps": 4})
    folder = world.run_folder("moments")
    done = {"rollout": 2, "scoring": 2, "update": 2, "save": 3}  # steps with metrics
    for phase, learned in done.items():
        fault = Sabotage(phase, 3, 1, "kill", str(tmp_path / phase))  # type: ignore[arg-type]
        argv = [str(recipe), "--run.name", folder.name, "--run.overwrite", "true"]
        with pytest.raises(RankError):
            run_ranks(_sabotaged, 2, argv, fault)
        assert Path(fault.marker).exists() and steps(folder) == list(range(1, learned + 1)), phase
        assert newest(folder) == 2, phase


@pytest.mark.slow
def test_a_fault_in_a_real_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank is killed while a checkpoint is written; the run that continues ends as one that was not disturbed."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    out = tmp_path / "drill.json"
    assert main(["drill", "kill_in_save", "--json", str(out), "--folder", str(tmp_path / "drill")]) == 0
    (row,) = json.loads(out.read_text())["faults"]
    assert row["passed"] and row["weights_equal"] and row["tokens_lost"] == 0 and row["seconds"] > 0
    assert row["fault"] == "kill_in_save" and "checkpoint of step 2" in row["happened"]


def test_what_the_drill_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fault that is handled, one that is not, one that ends in an error, and one that this machine does not allow."""

    def wrong(world: DrillWorld, name: str) -> Verdict:
        return Verdict(False, "other | weights", 2.0, 7, False)

    def impossible(world: DrillWorld, name: str) -> Verdict:
        raise NotPossible("needs root")

    def ends(world: DrillWorld, name: str) -> Verdict:
        raise CheckError("the fault's moment did not come")

    acts = {"fine": lambda world, name: Verdict(True, "as promised", None, 0, True)}
    acts |= {"wrong": wrong, "impossible": impossible, "ends": ends}
    monkeypatch.setattr(drill, "FAULTS", {name: Fault(f"what {name}", "expected", act) for name, act in acts.items()})
    page, out = tmp_path / "page.md", tmp_path / "drill.json"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main(["drill", "--json", str(out), "--write", str(page)]) == 1
    rows = json.loads(out.read_text())["faults"]
    assert [row["passed"] for row in rows] == [True, False, None, False]
    assert "4 faults, 2 failed: wrong, ends" in capsys.readouterr().out
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n| fault") and text.endswith(f"|\n{END}\nafter\n") and "old" not in text
    assert r"FAILED: other \| weights | 2.0 | 7 | no |" in text and "not possible here: needs root" in text

    assert main(["drill", "fin"]) == 2 and "'fine'" in capsys.readouterr().err
    assert main(["drill", "fine", "--write", str(tmp_path / "none.md")]) == 2 and BEGIN in capsys.readouterr().err

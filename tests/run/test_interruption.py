"""What a run says that Ctrl-C ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from asd_megatron.run.interruption import Interruption
from tests.run.starts import begin, checkpoint, recipe


@pytest.mark.parametrize("launched", [False, True])
def test_an_interrupted_rank_says_once_what_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], launched: bool
) -> None:
    """By the time that a signal has ended it; among several ranks of `asd-megatron train` the launcher says it."""
    monkeypatch.setenv("WORLD_SIZE", "2" if launched else "1")
    monkeypatch.setenv("RANK", "0")
    if launched:
        monkeypatch.setenv("ASD_MEGATRON_LAUNCHER", "1")
    monkeypatch.setenv("ASD_MEGATRON_COMMAND", "asd-megatron train r.yaml")
    begin(tmp_path / "run")
    interruption = Interruption(recipe(tmp_path / "run"))
    begin(tmp_path / "run")
    path = checkpoint(tmp_path / "run", 3)
    interruption()
    said = capsys.readouterr().err
    if launched:
        assert said == ""
    else:
        assert said.count("\n") == 1 and "step 3" in said and str(path) in said
        assert said.endswith("asd-megatron train r.yaml\n")

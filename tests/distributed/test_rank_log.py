"""The log of a rank on a full disk."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from asd_megatron.distributed.rank_log import LOGS, RankLog


def test_a_warning_that_cannot_be_written_is_no_traceback(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / LOGS).mkdir()
    (tmp_path / LOGS / "rank_0.log").symlink_to("/dev/full")
    log = RankLog(tmp_path, 0)
    log.begin("fresh start")
    logging.getLogger("asd_megatron.test").warning("slow")
    log.close()
    assert "Traceback" not in capfd.readouterr().err

"""`asd-megatron study FILE`: many recipes and seeds, one table."""

from __future__ import annotations

import argparse
import signal
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FrameType

from asd_megatron.config.yaml_text import to_yaml
from asd_megatron.errors import UserError, plural
from asd_megatron.files import atomic_write
from asd_megatron.observe.progress import clock_text
from asd_megatron.run.sources import model_folder
from asd_megatron.study.cells import CellRecord, check_unchanged, read_record
from asd_megatron.study.plan import Cell, plan_cells
from asd_megatron.study.progress import StudyProgress
from asd_megatron.study.runner import Runner, locked
from asd_megatron.study.schema import Study, load_study

FAILED = 1  # exit status: at least one cell failed
DESCRIPTION = """\
Run every cell (arm x start x seed) of a study file as an ordinary `asd-megatron train` run, then write tables and
plots. Called again, it skips the cells that are finished and runs the others. docs/studies.md has the file's format;
examples/studies/puzzle.yaml is one.
"""
EPILOG = """\
what it writes into the study's folder:
  study.yaml              the study, every key
  cells/ARM/START/seed_N/ cell.json (recipe, status, times), log.txt, run/ (the run's own folder)
  results.jsonl           one line a cell and evaluation
  report.md, plots/       tables and curves

exit status: 0; 1 if a cell failed (report.md says which); 2 for an error in the file; 130 after Ctrl-C, which ends the
running cells and keeps the finished ones.
"""


def main(argv: Sequence[str]) -> int:
    """Run, list or report a study; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="asd-megatron study",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="the study (YAML)")
    parser.add_argument("--only", metavar="ARM[,ARM]", help="run the cells of these arms; the report shows all")
    parser.add_argument("--parallel", metavar="N", type=int, help="cells at a time, instead of the file's `parallel`")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--dry-run", action="store_true", help="list the cells, their steps and states")
    action.add_argument("--report", action="store_true", help="run nothing: regenerate the tables and plots")
    arguments = parser.parse_args(argv)
    study = load_study(arguments.file)
    only = None if arguments.only is None else [name.strip() for name in arguments.only.split(",")]
    parallel = study.parallel if arguments.parallel is None else arguments.parallel
    if parallel < 1:
        raise UserError(f"--parallel: expected a whole number >= 1, was given {parallel}")
    if arguments.report:
        return _report(study)
    cells = plan_cells(study, only)
    records = {cell: check_unchanged(cell) for cell in cells}
    if arguments.dry_run:
        return _list(study, records)
    _check_models(cells)
    return _run(study, records, parallel)


def _run(study: Study, records: dict[Cell, CellRecord | None], parallel: int) -> int:
    waiting = [cell for cell, record in records.items() if record is None or record.status != "finished"]
    with locked(study.path) as lock:
        atomic_write(study.path / "study.yaml", to_yaml(study.model_dump(mode="json")))
        progress = StudyProgress(len(records), done=len(records) - len(waiting), parallel=parallel)
        cells = plural(len(records), "cell")
        progress.note(f"study {study.name}: {len(waiting)} of {cells} to run, {parallel} at a time")
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            Runner(parallel=parallel, timeout=study.timeout, progress=progress, lock=lock).run(waiting)
        except KeyboardInterrupt:
            progress.note("interrupted: start the same command again to continue")
            raise
        finally:
            progress.close()
            signal.signal(signal.SIGTERM, before)
    return _report(study)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _check_models(cells: Sequence[Cell]) -> None:
    """Raises UserError for models that are not there, before a cell is run for one."""
    if missing := _missing_models(cells):
        raise UserError("; ".join(missing))


def _missing_models(cells: Iterable[Cell]) -> list[str]:
    """A line for each model that is not there, with the first cell that starts from it."""
    first: dict[str, Cell] = {}
    for cell in cells:
        first.setdefault(cell.recipe.model.path, cell)
    return [
        f"model.path of cell {cell.key}: {path} is no model folder (no config.json): make it first"
        for path, cell in first.items()
        if not (model_folder(path) / "config.json").is_file()
    ]


def _list(study: Study, records: dict[Cell, CellRecord | None]) -> int:
    """Print the study's folder and, for each cell, its place there, its steps and its state."""
    print(f"study {study.name} in {study.path}, each cell in {study.path / 'cells'}/ARM/START/seed_N:")
    for cell, record in records.items():
        print(f"{cell.key!s:50s} {plural(cell.recipe.run.steps, 'step'):>12s}  {_state(record)}")
    counts = Counter("waiting" if record is None else record.status for record in records.values())
    print(f"{plural(len(records), 'cell')}: " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    for line in _missing_models(records):
        print(line)
    return 0


def _state(record: CellRecord | None) -> str:
    if record is None:
        return "waiting"
    return record.status + ("" if record.seconds is None else f" in {clock_text(record.seconds)}")


def _report(study: Study) -> int:
    """Tables and plots of the study, from the cells that are finished."""
    from asd_megatron.study.plots import plot_study  # matplotlib and more
    from asd_megatron.study.report import Findings, equal_arms, equal_arms_text, write_report
    from asd_megatron.study.results import finished, write_results

    cells = plan_cells(study)
    records = {cell.key: read_record(cell.folder) for cell in cells}
    results = finished((cell.key, cell.run_folder, records[cell.key]) for cell in cells)
    write_results(study.path, results)
    findings = Findings(study, records, results)
    report = write_report(findings, plot_study(findings))
    for pair in equal_arms(findings):
        print(f"warning: {equal_arms_text(*pair)}")
    failed = [str(key) for key, record in records.items() if record is not None and record.status == "failed"]
    said = f"; failed: {', '.join(failed)}" if failed else ""
    print(f"{report}: {len(results)} of {plural(len(cells), 'cell')}{said}")
    return FAILED if failed else 0

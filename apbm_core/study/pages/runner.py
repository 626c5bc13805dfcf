"""Run the study's notebooks with a profile's parameters, and put records and rendered pages under results/.

    python -m apbm_core.study.pages run --profile quick epochs=3         train and render, into results/own/<profile>
    python -m apbm_core.study.pages calibrate --profile quick            measure what the phases take, alone, in minutes
    python -m apbm_core.study.pages report --profile quick               render results/<profile> from its records alone
    python -m apbm_core.study.pages list                                 the profiles and the parameters
    python -m apbm_core.study.pages check                                are the notebooks' sources clean?

`run` trains what its results folder does not hold yet: in results/own everything, the first time. With
`--results results` it adds to the published records, which are committed. Every parameter is checked before anything
runs. Notebooks run in the repository's root with this interpreter. A finished notebook replaces the one before it in
one step; a failed one is kept aside, in <profile>/failed/, with its traceback. One reproduction at a time may write to
a results folder.
"""

import argparse
import logging
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import filelock

from apbm_core.errors import ApbmError, ConfigError
from apbm_core.files import remove_stale_temporaries, write_atomically
from apbm_core.study.grid import parameters
from apbm_core.study.grid.budget import STARTED
from apbm_core.study.grid.grid import RECORDS_ONLY, Study
from apbm_core.study.grid.profiles import lay_over, load_profile, parse_with_assignments, profile_names
from apbm_core.study.grid.work import Work
from apbm_core.study.pages import front
from apbm_core.study.pages import index as index_pages
from apbm_core.study.pages.execution import execute
from apbm_core.study.pages.sources import Reproduction, Source, check_sources, displayed, prepare
from apbm_core.study.records import OWN, PUBLISHED_RESULTS, read_record
from apbm_core.study.report.frames import beside_published
from apbm_core.study.training import stopping
from apbm_core.study.training.stopping import Stopped


class StudyInterrupted(KeyboardInterrupt):
    """The user or the system stopped the study; the message says what is finished and how to go on."""


def reproduce(reproduction: Reproduction, records_only: bool = False) -> Path:
    """Run the study's notebooks in order; write notebooks, HTML pages and index pages under ``reproduction.folder``.

    Args:
        reproduction: from :func:`prepare`.
        records_only: in the notebooks, a run that is not recorded is left out and named, not carried out.

    Returns:
        The index page.

    Raises:
        NotebookFailed: a cell raised an error. Notebooks that finished before are written, later ones did not run.
        StudyInterrupted: Ctrl-C or SIGTERM.
        ApbmError: the folder cannot be written, or another reproduction is writing to it.
    """
    if records_only and not any(reproduction.folder.glob("runs/*.json")):
        results = reproduction.displayed(reproduction.results)
        command = f"make reproduce PROFILE={reproduction.profile} RESULTS={results}"
        has_own = any((reproduction.root / OWN / reproduction.profile).glob("runs/*.json"))
        advice = f"your own are in {OWN}: make report RESULTS={OWN}" if has_own else f"first run: {command}"
        raise ConfigError(f"{results}/{reproduction.profile} holds no recorded runs to report on; {advice}")
    finished: list[str] = []
    warned: set[str] = set()
    index = reproduction.folder / "index.html"
    package = os.pathsep.join([str(Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {"PYTHONPATH": package, "PYTHONHASHSEED": "0", RECORDS_ONLY: str(int(records_only))}
    with exclusive(reproduction.folder), _environment(variables):
        for folder in (reproduction.folder, *(reproduction.folder / name for name in ("figures", "tables", "failed"))):
            remove_stale_temporaries(folder)
        remove_stale_temporaries(reproduction.results, older_than=60)  # shared with other profiles' reproductions
        for source in reproduction.notebooks:
            try:
                seconds = execute(reproduction, source, warned)
            except KeyboardInterrupt:
                raise StudyInterrupted(_how_to_go_on(reproduction, source, finished)) from None
            finally:
                shutil.rmtree(reproduction.folder / ".executing", ignore_errors=True)
                index = index_pages.write_index(reproduction.folder, reproduction.profile, reproduction.description)
            finished.append(source.name)
            print(f"{source.name:<14}{seconds:8.1f} s", flush=True)
        _set_beside_published(reproduction)
        index_pages.write_notebook_pages(reproduction.folder)  # anew, now that each knows the others
        index = index_pages.write_index(reproduction.folder, reproduction.profile, reproduction.description)
    front.write(reproduction.results)
    return index


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the one lock on a results folder; the system releases it when the process ends, however it ends.

    Raises:
        ApbmError: another process holds it, or the folder cannot be written.
    """
    path = folder / ".reproduction.lock"
    lock = filelock.FileLock(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    except filelock.Timeout:
        holder = path.read_text() or "another process"
        raise ApbmError(
            f"{folder} is being written by {holder}; wait for it to end, or choose another folder with --results "
            "(make: RESULTS=...)."
        ) from None
    except OSError as error:
        raise ApbmError(f"cannot write to {folder}: {error.strerror or error}; choose another folder.") from error
    try:
        yield
    finally:
        lock.release()


def _train_first(reproduction: Reproduction) -> None:
    """Where a study is to end in time, carry out its runs before any notebook: this process is the one that is asked to
    end, and it saves what is under way."""
    effective = lay_over(load_profile(reproduction.root, reproduction.profile), reproduction.changes).parameters
    if effective.minutes is None or "04_compare" not in [source.name for source in reproduction.notebooks]:
        return
    before = signal.signal(signal.SIGTERM, stopping.ask)
    try:
        Study(effective, reproduction.folder, records_only=False).run()
    finally:
        signal.signal(signal.SIGTERM, before)


def _set_beside_published(reproduction: Reproduction) -> bool:
    """Print and store this folder's runs beside the published records of the same runs; False if there are none."""
    published = {path.name for path in reproduction.published.glob("runs/*.json")}
    here = [path for path in sorted(reproduction.folder.glob("runs/*.json")) if path.name in published]
    if not here or reproduction.folder.resolve() == reproduction.published.resolve():
        return False
    table = beside_published([read_record(path) for path in here], reproduction.published)
    most = table["difference"].abs().max()
    stored = reproduction.folder / "tables" / "beside_published.csv"
    write_atomically(stored, table.to_csv(index=False, float_format="%.6g"))
    there = reproduction.displayed(reproduction.published)
    print(f"\nYour runs (here) beside the published ones (there, {there}):")
    print(table.to_string(index=False, float_format="{:.2f}".format))
    print(f"{len(table)} runs; their accuracies differ by at most {most:.2f} points.\n", flush=True)
    return True


def _how_to_go_on(reproduction: Reproduction, source: Source, finished: Sequence[str]) -> str:
    where = reproduction.displayed(reproduction.folder)
    done = f"Finished and in {where}: {', '.join(finished)}." if finished else f"What was in {where} is unchanged."
    return f"interrupted in {source.name}. {done}\nThe same command goes on from here: recorded runs are not repeated."


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, which the kernels inherit, for the duration of a block."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _calibrate(reproduction: Reproduction) -> None:
    """Measure the phases of this profile's runs, if a notebook is asked for that shows their times."""
    if not any(source.name.startswith(("02", "03", "04")) for source in reproduction.notebooks):
        return
    start = time.perf_counter()
    wanted = lay_over(load_profile(reproduction.root, reproduction.profile), reproduction.changes).parameters
    if wanted.minutes is not None:  # it cannot be stopped and continued, and would take the minutes of the runs
        print("With minutes nothing is calibrated: leave them out for that, in a call of `calibrate`.", flush=True)
        return
    study = Study(wanted, reproduction.folder, records_only=False)
    with exclusive(reproduction.folder):
        found = study.calibrate()
    seconds = time.perf_counter() - start
    if found is None:
        print("These runs are too short to be calibrated; their tables show the seconds that they took.")
    else:
        print(f"Calibrated on {found.machine}: {len(found.runs)} kinds of run known, {seconds:.0f} s.", flush=True)
        work = Work(study)
        if work.missing():
            print(f'{work.plan()} To stop earlier and go on another time: PARAMS="minutes=20".', flush=True)


def _list(root: Path) -> None:
    print("Profiles (--profile):")
    for name in profile_names(root):
        print(f"  {name:<10} {load_profile(root, name).description}".rstrip())
    print("\nParameters (-p name=value), with their defaults:")
    for name, field in parameters.StudyParameters.model_fields.items():
        default = field.get_default(call_default_factory=True)
        print(f"  {name} = {default!r}\n      {field.description or ''}".rstrip())


def _check(root: Path) -> int:
    problems = check_sources(root)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"notebooks: {len(problems)} problem{'s' * (len(problems) != 1)}")
    return int(bool(problems))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options; argparse ends the program when they make no sense."""
    parser = argparse.ArgumentParser(prog="python -m apbm_core.study.pages", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    known = {
        "run": "train what is not recorded yet, and render",
        "report": "render without training",
        "calibrate": "measure the seconds of every phase on this machine, with nothing else running",
    }
    for name, text in known.items():
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.add_argument("--profile", default="quick", help="a file in notebooks/profiles (default: %(default)s)")
        folder = PUBLISHED_RESULTS if name == "report" else OWN
        command.add_argument("--results", default=folder, help="folder for the results (default: %(default)s)")
        command.add_argument("--only", metavar="NOTEBOOK", action="append", default=[], help="may be given repeatedly")
        command.add_argument("-p", dest="assignments", metavar="NAME=VALUE", action="append", default=[])
        command.add_argument("more", metavar="NAME=VALUE", nargs="*", help="the same without -p; values are YAML")
    commands.add_parser("list", help="the profiles and the parameters")
    commands.add_parser("check", help="are the notebooks' sources clean?")
    return parse_with_assignments(parser, arguments)


def main(arguments: Sequence[str] | None = None, root: Path | None = None) -> int:
    """The command line. Returns the exit code: 0, 1 for an error that the user can mend, 75 when the minutes are
    over and the same command goes on, 130 when interrupted."""
    options = parse(arguments)
    root = (root or Path(__file__).parents[3]).resolve()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the kernels too, and says how to go on
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # of a cell that was interrupted it would print everything
    try:
        if options.command == "check":
            return _check(root)
        if options.command == "list":
            _list(root)
            return 0
        assignments = [*options.assignments, *options.more]
        reproduction = prepare(root, options.profile, options.results, assignments, options.only)
        if options.command == "calibrate":
            _calibrate(reproduction)
            return 0
        with _environment({STARTED: str(time.time())}):
            if options.command == "run":
                _train_first(reproduction)
            print(f"Open {displayed(reproduce(reproduction, options.command == 'report'), root)}")
        return 0
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return stopping.GO_ON
    except ApbmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"\n{error or 'interrupted'}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

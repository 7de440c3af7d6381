"""Run, check and refresh the notebooks: python book/notebooks.py run | check | refresh | stale | times [NAME ...].

run      papermill into _build/run/PROFILE/. At the committed profile, a notebook whose stored outputs come from today's
         inputs (stale.py: its cells, the code and the data that they use, the pins) is not run: its outputs are taken as
         committed. --all runs those too. What ran here, and whose inputs are the same still, is never run again, so that a
         second call goes on where the first was cut off. notebooks/ stays as it is.
check    nbval on notebooks/ as committed, one pytest run a notebook: those that are stale, and the tour, so that every
         machine runs one chapter at least. --all checks every one. What has passed here is not checked again until its
         inputs or outputs change (make clean forgets it).
refresh  papermill in place, of those notebooks that are stale (--all: of every one), or of those named; then what differs
         between two equal runs is taken out: refreshing twice gives no diff. The inputs are written into the notebook.
stale    lists the notebooks whose stored outputs come from other inputs than today's, and which inputs changed.
times    run at a profile, every one, and how long each took into book/profiles.json, which the book shows.

All run a notebook with notebooks/ as its working folder, as JupyterLab does. Several notebooks run at a time, each in a
process of its own with one thread (--jobs; one per core, at most eight, if not said), the heaviest first. One thread
uses a core better than two threads use two, and sums do not depend on the number of cores.
"""

import argparse
import base64
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError

from stale import Checkout, changed, digest, stamp
from stale import read as read_json

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
BUILD = ROOT / "_build"

PROFILES = ROOT / "book" / "profiles.json"
TOUR = "00_tour"
README_FIGURE = "fig-v10-map"
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


def find(names: list[str]) -> list[Path]:
    """All notebooks in the order of their names, or those named: '10_v10', '10_v10.ipynb', 'notebooks/10_v10.ipynb'."""
    there = sorted(NOTEBOOKS.glob("*.ipynb"))
    if not names:
        return there
    stems = {Path(name).name.removesuffix(".ipynb") for name in names}
    unknown = stems - {path.stem for path in there}
    if unknown:
        raise SystemExit(f"no notebook {', '.join(sorted(unknown))}; there are {', '.join(p.stem for p in there)}.")
    return [path for path in there if path.stem in stems]


def run_folder(profile: str) -> Path:
    """Where the run of a profile lies; '' is the notebooks' own default, the committed one."""
    return BUILD / "run" / (profile or "committed")


def execute(notebook: Path, output: Path, parameters: dict) -> None:
    """Run a notebook to `output`; when a cell fails, what ran so far is left beside it as NAME.failed.ipynb."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(".partial.ipynb")
    try:
        papermill.execute_notebook(notebook, partial, parameters, kernel_name="python3", language="python",
                                   cwd=NOTEBOOKS, progress_bar=False, extra_arguments=["--log-level=ERROR"])
    except papermill.PapermillExecutionError:
        partial.replace(output.with_suffix(".failed.ipynb"))
        raise
    partial.replace(output)
    output.with_suffix(".failed.ipynb").unlink(missing_ok=True)


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------- several at a time, and what is left of them

def to_go(expected: dict[str, float], began: dict[str, float], took: dict[str, float], jobs: int, now: float) -> float:
    """Seconds until all are done, `jobs` at a time: the expected ones, at the pace of those that are done.

    expected: seconds by name, as measured earlier; began: when those that run or are done began; took: seconds of those done.
    """
    done = sum(expected[name] for name in took)
    pace = sum(took.values()) / done if done else 1.0
    left = [max(0.0, pace * seconds - (now - began.get(name, now))) for name, seconds in expected.items() if name not in took]
    return max([sum(left) / jobs, *left], default=0.0)


def clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def bar(done: int, total: int, words: str, width: int) -> str:
    """A line no wider than a terminal: how much is done, and words."""
    full = 20 * done // max(total, 1)
    return f"[{'#' * full}{'.' * (20 - full)}] {done} of {total}, {words}"[:max(width - 1, 20)]


def each(notebooks: list[Path], verb: str, jobs: int, work: Callable, seconds: dict[str, float]) -> None:
    """Call work(notebook) -> (passed, output) on all, `jobs` at a time, the heaviest first; print each one's output whole.

    seconds: what is known of how long each takes, by name.  A terminal shows a bar of what runs and how long it will take;
    elsewhere, the line of each notebook that is done says so.  Goes on after a failure, but ends with exit code 1.
    """
    usual = sum(seconds.values()) / len(seconds) if seconds else 0.0
    expected = {notebook.stem: seconds.get(notebook.stem, usual) for notebook in notebooks}
    order = sorted(notebooks, key=lambda notebook: -expected[notebook.stem])
    began, took, failed, started, live = {}, {}, [], time.monotonic(), sys.stdout.isatty()

    def timed(notebook):
        began[notebook.stem] = time.monotonic()
        return *work(notebook), time.monotonic() - began[notebook.stem]

    def ahead():
        names = [name for name in list(began) if name not in took]
        left = to_go(expected, dict(began), took, jobs, time.monotonic())
        return (f"about {clock(left)} to go, " if left else "") + f"{verb} {', '.join(names) or 'nothing more'}"

    pool = ThreadPoolExecutor(jobs)
    todo = {pool.submit(timed, notebook): notebook for notebook in order}
    try:
        while todo:
            done, _ = wait(todo, timeout=1, return_when=FIRST_COMPLETED)
            for future in done:
                notebook = todo.pop(future)
                passed, output, took[notebook.stem] = future.result()
                failed += [] if passed else [notebook.name]
                line = f"[{len(took)}/{len(order)}] {notebook.stem}: {'done' if passed else 'FAILED'} after " \
                       f"{took[notebook.stem]:.0f} s"
                print("\r\033[K" * live + output, end="" if output.endswith("\n") or not output else "\n")
                print(line if live or not todo else f"{line}; {ahead()}", flush=True)
            if live and todo:
                print("\r\033[K" + bar(len(took), len(order), ahead(), shutil.get_terminal_size().columns), end="", flush=True)
    except KeyboardInterrupt:                    # the notebooks that ran have had the signal, too
        raise SystemExit("\nInterrupted. The same command goes on from here.") from None
    finally:
        pool.shutdown(cancel_futures=True)
    if order:
        print(f"{len(order)} notebooks in {time.monotonic() - started:.0f} s, {jobs} at a time", flush=True)
    if failed:
        raise SystemExit(f"{len(failed)} of {len(order)} notebooks failed: {', '.join(sorted(failed))}. "
                         "The same command repeats only what has not passed.")


def process(command: list[str]) -> tuple[bool, str, float]:
    """Run a command with one thread: (did it end well, what it printed, CPU seconds of it and its children)."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    printed = child.stdout.read()
    _, status, used = os.wait4(child.pid, 0)
    child.stdout.close()
    child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode == 0, printed, used.ru_utime + used.ru_stime


def by_papermill(notebook: Path, output: Path, profile: str, checkout: Checkout) -> tuple[bool, str]:
    """`execute` in a process of its own; then what the output depended on is written into it, with the CPU seconds.

    Where an input changed meanwhile, nobody knows which of its states a cell saw: such an output stays stale, and says so.
    """
    task = json.dumps({"notebook": str(notebook), "output": str(output), "parameters": {"profile": profile} if profile else {}})
    before = checkout.current().inputs(notebook, profile)
    done, said, seconds = process([sys.executable, __file__, "execute", task])
    if done:
        same = checkout.current().inputs(notebook, profile) == before
        said += "" if same else f"{notebook.stem}: code or data changed while it ran; it stays stale.\n"
        nb = nbformat.read(output, as_version=4)
        nb.metadata["alr"] = {"inputs": before if same else {}, "seconds": round(seconds)}
        nbformat.write(nb, output)
    return done, said


def durations(notebooks: list[Path], profile: str = "") -> dict[str, float]:
    """Seconds by name: of the last run here at this profile, else as `refresh` has stored them."""
    known = {notebook.stem: stamp(run_folder(profile) / notebook.name).get("seconds") or stamp(notebook).get("seconds")
             for notebook in notebooks}
    return {name: seconds for name, seconds in known.items() if seconds}


# ---------------------------------------------------------------- run, check, refresh, stale

def ran_here(output: Path) -> bool:
    """Has papermill made this output, or is it a committed one, which `clean` has been through?"""
    return "papermill" in read_json(output)["metadata"]


def renew(notebook: Path, output: Path) -> None:
    """Give an output today's words and metadata: only its cells' outputs stay.  The code is the same, word for word."""
    new, ran = nbformat.read(notebook, as_version=4), nbformat.read(output, as_version=4)
    own = [cell for cell in ran.cells
           if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", [])]
    for cell, old in zip([cell for cell in new.cells if cell.cell_type == "code"], own, strict=True):
        cell.outputs, cell.execution_count = old.outputs, old.execution_count
    new.metadata = ran.metadata
    nbformat.write(new, output)


def run(notebooks: list[Path], profile: str, jobs: int = 1, everything: bool = False) -> None:
    """Every notebook, at a profile, in its run folder: by papermill, unless its outputs are known already."""
    folder, checkout = run_folder(profile), Checkout(ROOT)
    folder.mkdir(parents=True, exist_ok=True)
    fresh, committed, todo = [], [], []
    for notebook in notebooks:
        output, inputs = folder / notebook.name, checkout.inputs(notebook, profile)
        if ran_here(output) and not changed(output, inputs):
            renew(notebook, output)
            fresh.append(notebook)
        elif not everything and not changed(notebook, inputs):
            shutil.copyfile(notebook, output)
            committed.append(notebook)
        else:
            todo.append(notebook)
    if fresh:
        print(f"{len(fresh)} of {len(notebooks)} notebooks have run here with today's inputs (_build/run/{folder.name})")
    if committed:
        print(f"{len(committed)} of {len(notebooks)} chapters are as committed; make book ARGS=--all runs every one")
    each(todo, "running", jobs, lambda notebook: by_papermill(notebook, folder / notebook.name, profile, checkout),
         durations(notebooks, profile))


def check(notebooks: list[Path], jobs: int = 1, everything: bool = False) -> None:
    """nbval: every cell runs again in a fresh kernel; those tagged nbval-check-output must print the same.

    Not `everything`: the stale ones and TOUR, since the others' outputs come from today's inputs, if from another machine.
    """
    old = stale(notebooks)
    folder, checkout, all_of_them = BUILD / "check", Checkout(ROOT), notebooks
    notebooks = notebooks if everything else [notebook for notebook in notebooks if notebook in old or notebook.stem == TOUR]
    if len(notebooks) < len(all_of_them):
        print(f"{len(all_of_them) - len(notebooks)} of {len(all_of_them)} chapters are as committed; "
              "make test ARGS=--all runs every one")
    folder.mkdir(parents=True, exist_ok=True)

    def state(notebook):
        cells = [cell for cell in read_json(notebook)["cells"] if cell["cell_type"] == "code"]
        return digest(checkout.inputs(notebook), cells, platform.python_version())

    def stored(notebook):
        path = folder / f"{notebook.stem}.passed"
        return path.read_text(encoding="utf8") if path.exists() else ""

    def work(notebook):
        options = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=600"]
        done, output, _ = process([sys.executable, "-m", "pytest", *options, str(notebook)])
        if done:
            (folder / f"{notebook.stem}.passed").write_text(states[notebook], encoding="utf8")
        return done, output

    states = {notebook: state(notebook) for notebook in notebooks}
    todo = [notebook for notebook in notebooks if stored(notebook) != states[notebook]]
    if len(todo) < len(notebooks):
        print(f"{len(notebooks) - len(todo)} of {len(notebooks)} notebooks have passed here as they are")
    each(todo, "checking", jobs, work, durations(notebooks))
    print(f"{len(notebooks)} notebooks ran as committed")


def stale(notebooks: list[Path]) -> list[Path]:
    """The notebooks whose stored outputs come from other inputs than today's; says which inputs, in one line each."""
    checkout = Checkout(ROOT)
    found = {notebook: changed(notebook, checkout.inputs(notebook)) for notebook in notebooks}
    found = {notebook: names for notebook, names in found.items() if names}
    for notebook, names in found.items():
        print(f"stale: {notebook.stem} ({', '.join(names) if stamp(notebook).get('inputs') else 'says no inputs'})")
    if found:
        print(f"{len(found)} of {len(notebooks)} notebooks have stored outputs of other inputs than today's; "
              "make refresh runs them in place")
    return list(found)


def times(notebooks: list[Path], profile: str, jobs: int = 1) -> None:
    """`run` every notebook at a profile; each that ran is written into PROFILES, with its CPU seconds, the day, the machine.

    A notebook that fails there leaves no time, and the exit code is 1 as in `run`.
    """
    from alr.lab.device import pick_device, processor  # torch takes seconds: not for the other actions
    machine = processor(pick_device("auto"))
    try:
        run(notebooks, profile, jobs, everything=True)
    finally:
        known = json.loads(PROFILES.read_text(encoding="utf8")) if PROFILES.exists() else {}
        for notebook in notebooks:
            seconds = stamp(run_folder(profile) / notebook.name).get("seconds")
            of = known.setdefault(profile, {})
            if seconds and of.get(notebook.stem, {}).get("seconds") != seconds:        # else it ran on an earlier day
                of[notebook.stem] = {"seconds": seconds, "day": time.strftime("%Y-%m-%d"), "processor": machine}
        PROFILES.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf8")


def clean(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Take out, in place, what differs between two equal runs: times, papermill's notes, versions, cuts in a stream."""
    nb.metadata.pop("papermill", None)
    nb.metadata["kernelspec"] = dict(KERNEL)
    nb.metadata["language_info"] = {"name": "python"}
    for cell in nb.cells:
        for key in ("papermill", "execution", "ExecuteTime"):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
        if cell.cell_type == "code":
            cell.outputs = merge_streams(cell.outputs)
    return nb


def merge_streams(outputs: list) -> list:
    """Neighbouring pieces of stdout (or stderr) as one: where a kernel cuts them depends on its timing."""
    merged = []
    for output in outputs:
        if merged and output.output_type == "stream" == merged[-1].output_type and output.name == merged[-1].name:
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


def steady(new: float, old: float | None) -> float:
    """A stored number of seconds stays until it is wrong by more than half: no diff because a machine was a little slower."""
    return old if old and 2 / 3 <= new / old <= 3 / 2 else new


def refresh(notebooks: list[Path], jobs: int = 1) -> None:
    """Run in place, without parameters; a notebook that fails stays as it was."""
    checkout = Checkout(ROOT)

    def work(notebook):
        output = BUILD / "refresh" / notebook.name
        done, said = by_papermill(notebook, output, "", checkout)
        if done:
            nb = clean(nbformat.read(output, as_version=4))
            nb.metadata["alr"]["seconds"] = steady(nb.metadata["alr"]["seconds"], stamp(notebook).get("seconds"))
            nbformat.write(nb, output)
            output.replace(notebook)
            picture(nb)
        return done, said

    each(notebooks, "refreshing", jobs, work, durations(notebooks))


def picture(nb: nbformat.NotebookNode) -> None:
    """The README's picture is a figure of the book: written anew whenever the chapter that draws it is."""
    for cell in nb.cells:
        if cell.metadata.get("mystnb", {}).get("figure", {}).get("name") == README_FIGURE:
            png = next(o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {}))
            (ROOT / "book" / "_static" / "readme.png").write_bytes(base64.b64decode(png))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "check", "refresh", "stale", "times", "execute"],
                        help="execute: one notebook, for the others")
    parser.add_argument("names", nargs="*", metavar="NAME", help="notebooks, by name; all of them if none is given")
    parser.add_argument("--profile", default="", choices=["", "ci", "cpu", "full"],
                        help="for run and times: cpu or full; as committed if not said")
    parser.add_argument("--all", action="store_true", help="also those that are as committed and not stale")
    parser.add_argument("--jobs", type=int, default=min(8, cores()), help="notebooks at a time")
    args = parser.parse_intermixed_args()          # names and options in any order
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}; wanted at least 1.")

    os.environ["TQDM_DISABLE"] = "1"                           # a progress bar has no place on a page
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"                # kernel python3 is this Python
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"         # or the debugger complains of frozen modules
    os.chdir(ROOT)
    if args.action == "execute":
        task = json.loads(args.names[0])
        try:
            execute(Path(task["notebook"]), Path(task["output"]), task["parameters"])
        except (papermill.PapermillExecutionError, DeadKernelError) as error:
            raise SystemExit(str(error)) from None
        return
    notebooks = find(args.names)
    if not notebooks:
        print("notebooks/ holds no notebook yet")
    elif args.action == "run":
        run(notebooks, args.profile, args.jobs, args.all)
    elif args.action == "check":
        check(notebooks, args.jobs, args.all or bool(args.names))
    elif args.action == "times":
        if not args.profile:
            parser.error("times needs a --profile: cpu or full.")
        times(notebooks, args.profile, args.jobs)
    elif args.action == "refresh":
        refresh(notebooks if args.all or args.names else stale(notebooks), args.jobs)
    elif not stale(notebooks):
        print(f"{len(notebooks)} of {len(notebooks)} notebooks have stored outputs of today's inputs")


if __name__ == "__main__":
    main()

"""Run, check and refresh the notebooks: python book/notebooks.py run | check | refresh [NAME ...] [--profile cpu].

run      papermill into _build/run/PROFILE/. A notebook whose output is newer than the notebook, alr/, the recorded runs
         and the pins is skipped, so a second call goes on where the first was cut off. notebooks/ stays as it is.
check    nbval on notebooks/ as committed, one pytest run a notebook. What passed is remembered until all have passed.
refresh  papermill in place; then what differs between two equal runs is taken out: refreshing twice gives no diff.

All three run a notebook with notebooks/ as its working folder, as JupyterLab does.  Several notebooks run at a time, each
in a process of its own with its share of the cores (--jobs; one per core, at most four, if not said), those that took
longest the last time first.
"""

import argparse
import base64
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
BUILD = ROOT / "_build"

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


def newest_input(notebook: Path) -> float:
    """Time of the last change to anything a notebook's output depends on: itself, alr/, the records, the pins."""
    inputs = [notebook, ROOT / "constraints.txt", ROOT / "data" / "claims.json"]
    inputs += (ROOT / "alr").rglob("*.py")
    inputs += (ROOT / "data" / "runs").rglob("*.jsonl")
    return max(path.stat().st_mtime for path in inputs if path.exists())


def execute(notebook: Path, output: Path, parameters: dict) -> None:
    """Run a notebook to `output`; when a cell fails, what ran so far is left beside it as NAME.failed.ipynb."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(".partial.ipynb")
    started = time.time()
    try:
        papermill.execute_notebook(notebook, partial, parameters, kernel_name="python3", language="python",
                                   cwd=NOTEBOOKS, progress_bar=False, extra_arguments=["--log-level=ERROR"])
    except papermill.PapermillExecutionError:
        partial.replace(output.with_suffix(".failed.ipynb"))
        raise
    os.utime(partial, (started, started))        # a file changed while the notebook ran counts as newer
    partial.replace(output)
    output.with_suffix(".failed.ipynb").unlink(missing_ok=True)


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def remembered() -> dict[str, float]:
    """Seconds that each notebook took the last time, by name."""
    path = BUILD / "seconds.json"
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError):
        return {}


def each(notebooks: list[Path], verb: str, jobs: int, work) -> None:
    """Call work(notebook) -> (passed, output) on all, `jobs` at a time; say how long each took, and print its output whole.

    Goes on after a failure, but ends with exit code 1.
    """
    seconds, started, failed = remembered(), time.monotonic(), []
    order = sorted(notebooks, key=lambda notebook: -seconds.get(notebook.stem, 0.0))

    def timed(notebook):
        print(f"{verb} notebooks/{notebook.name} ...", flush=True)
        began = time.monotonic()
        return notebook, *work(notebook), time.monotonic() - began

    with ThreadPoolExecutor(jobs) as pool:
        for i, (notebook, passed, output, took) in enumerate(pool.map(timed, order), start=1):
            left = sum(seconds.get(other.stem, took) for other in order[i:]) / jobs
            ahead = f", about {left / 60:.0f} min to go" if left > 60 else ""
            print(output, end="" if output.endswith("\n") or not output else "\n")
            print(f"[{i}/{len(order)}] {notebook.stem}: {'done' if passed else 'FAILED'} after {took:.0f} s{ahead}", flush=True)
            seconds[notebook.stem] = round(took, 1)
            failed += [] if passed else [notebook.name]
    if order:
        BUILD.mkdir(exist_ok=True)
        (BUILD / "seconds.json").write_text(json.dumps(seconds, indent=1), encoding="utf8")
        print(f"{len(order)} notebooks in {time.monotonic() - started:.0f} s, {jobs} at a time", flush=True)
    if failed:
        raise SystemExit(f"{len(failed)} of {len(order)} notebooks failed: {', '.join(sorted(failed))}. "
                         "The same command repeats only what has not passed.")


def process(command: list[str], jobs: int) -> tuple[bool, str]:
    """Run a command with its share of the cores: (did it end well, what it printed)."""
    threads = str(max(1, cores() // jobs))
    env = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode == 0, done.stdout


def by_papermill(notebook: Path, output: Path, parameters: dict, jobs: int) -> tuple[bool, str]:
    """`execute` in a process of its own."""
    task = json.dumps({"notebook": str(notebook), "output": str(output), "parameters": parameters})
    return process([sys.executable, __file__, "execute", task], jobs)


def run(notebooks: list[Path], profile: str, jobs: int = 1) -> None:
    """Every notebook by papermill, at a profile, into its run folder."""
    folder = run_folder(profile)

    def fresh(notebook):
        output = folder / notebook.name
        return output.exists() and output.stat().st_mtime >= newest_input(notebook)

    def work(notebook):
        return by_papermill(notebook, folder / notebook.name, {"profile": profile} if profile else {}, jobs)

    todo = [notebook for notebook in notebooks if not fresh(notebook)]
    if len(todo) < len(notebooks):
        print(f"{len(notebooks) - len(todo)} of {len(notebooks)} notebooks are up to date in _build/run/{folder.name}")
    each(todo, "running", jobs, work)


def check(notebooks: list[Path], jobs: int = 1) -> None:
    """nbval: every cell runs again in a fresh kernel; those tagged nbval-check-output must print the same."""
    folder = BUILD / "check"
    folder.mkdir(parents=True, exist_ok=True)

    def passed(notebook):
        stamp = folder / f"{notebook.stem}.passed"
        return stamp.exists() and stamp.stat().st_mtime >= newest_input(notebook)

    def work(notebook):
        started = time.time()
        options = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=600"]
        done, output = process([sys.executable, "-m", "pytest", *options, str(notebook)], jobs)
        if done:
            stamp = folder / f"{notebook.stem}.passed"
            stamp.touch()
            os.utime(stamp, (started, started))
        return done, output

    todo = [notebook for notebook in notebooks if not passed(notebook)]
    if len(todo) < len(notebooks):
        print(f"{len(notebooks) - len(todo)} of {len(notebooks)} notebooks passed before the last check was cut off")
    each(todo, "checking", jobs, work)
    for notebook in notebooks:                   # all have passed: the next check begins anew
        (folder / f"{notebook.stem}.passed").unlink(missing_ok=True)
    print(f"{len(notebooks)} notebooks run as committed")


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


def refresh(notebooks: list[Path], jobs: int = 1) -> None:
    """Run in place, without parameters; a notebook that fails stays as it was."""

    def work(notebook):
        output = BUILD / "refresh" / notebook.name
        done, said = by_papermill(notebook, output, {}, jobs)
        if done:
            nb = clean(nbformat.read(output, as_version=4))
            nbformat.write(nb, output)
            output.replace(notebook)
            picture(nb)
        return done, said

    each(notebooks, "refreshing", jobs, work)


def picture(nb: nbformat.NotebookNode) -> None:
    """The README's picture is a figure of the book: written anew whenever the chapter that draws it is."""
    for cell in nb.cells:
        if cell.metadata.get("mystnb", {}).get("figure", {}).get("name") == README_FIGURE:
            png = next(o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {}))
            (ROOT / "book" / "_static" / "readme.png").write_bytes(base64.b64decode(png))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "check", "refresh", "execute"], help="execute: one notebook, for the others")
    parser.add_argument("names", nargs="*", metavar="NAME", help="notebooks, by name; all of them if none is given")
    parser.add_argument("--profile", default="", choices=["", "ci", "cpu", "full"],
                        help="for run: cpu or full; as committed if not said")
    parser.add_argument("--jobs", type=int, default=min(4, cores()), help="notebooks at a time")
    args = parser.parse_args()
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
        run(notebooks, args.profile, args.jobs)
    else:
        {"check": check, "refresh": refresh}[args.action](notebooks, args.jobs)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""What awaits a GPU, docs/gpu-todo.md, step by step: each with a limit of time and its outcome checked.

    python3 bench/gpu/run.py --list
    python3 run.py --pack . --group correctness --steps model --seconds 480
    python3 run.py --pack . --out results --steps engine,handover --again

With --pack (what pack.py made) on a machine without Rust; without it from a checkout whose programs --bin names. Python
3.11 or later, nothing else. Steps that lack something (a GPU, nvcc, PyTorch, NIXL) are SKIPPED, with what they lack.

Results are written as they come: it may be cut at any time, and goes on behind what has passed when it is called again
with the same --out, or with --done naming an earlier results.json. --out is $OUT if that is set; there are results.json
and table.txt (outcome and time of each step), figures.json and figures.txt (what was measured), log.txt (what programs
said, the end of each). Ends only processes that it started.
"""
import argparse
import concurrent.futures
import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback

LOG_BYTES_MAX = 300_000  # of a step
FILE_BYTES_MAX = 15 << 20
END_SECONDS = 3  # what was told to end has so long


class Failed(Exception):
    """A step's outcome is not the wanted one, as a sentence."""


class Skipped(Exception):
    """A step cannot be run here, as a sentence."""


class Machine:
    """Where steps run: programs, folders, what there is, and every process that was started."""

    def __init__(self, args):
        self.args, self.out, self.work = args, args.out.resolve(), args.work.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(parents=True, exist_ok=True)
        self.root = self.unpack(args.pack) if args.pack else pathlib.Path(__file__).resolve().parents[2]
        self.bin = args.bin.resolve() if args.bin else self.root / "bin"
        self.started, self.lock = set(), threading.Lock()
        self.deadline, self.log, self.cache = time.monotonic(), [], {}
        self.env = {**os.environ, **self.environment()}

    def unpack(self, folder):
        archive = folder / "pack.tar.xz"
        into = self.work / "pack"
        stamp = into / "unpacked"
        mark = f"{archive.stat().st_size} {archive.stat().st_mtime_ns}"
        if not stamp.exists() or stamp.read_text() != mark:
            shutil.rmtree(into, ignore_errors=True)
            with tarfile.open(archive) as tar:
                tar.extractall(into, filter="fully_trusted")
            stamp.write_text(mark)
        return into

    def environment(self):
        found = {"CARGO_TARGET_DIR": str(self.work / "target"), "NO_COLOR": "1",
                 "XDG_CACHE_HOME": str(self.work / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
        nvcc = shutil.which("nvcc")
        home = os.environ.get("CUDA_HOME") or (str(pathlib.Path(nvcc).resolve().parents[1]) if nvcc else None)
        if home and (pathlib.Path(home) / "bin/nvcc").exists():
            found["CUDA_HOME"] = home
        libraries = [self.args.cuda_lib] if self.args.cuda_lib else self.library_folders(home)
        given = os.environ.get("LD_LIBRARY_PATH")
        found["LD_LIBRARY_PATH"] = ":".join([*filter(None, [given]), *map(str, libraries)])
        return found

    def test_environment(self):
        """What tests were compiled with and has another place here; the program itself would warn of it."""
        library = self.bin / "libfibres.so"
        found = {"TANDEM_FIBRES_LIBRARY": str(library)} if library.exists() else {}
        return {**found, "TANDEM_TEST_ROOT": str(self.root)}

    def library_folders(self, home):
        """Where libcublasLt and libnvrtc of CUDA 13 are: of Python's packages, else of the toolkit."""
        folders = [pathlib.Path(path) / "nvidia" for path in sys.path if path.endswith("-packages")]
        places = [folder / name for folder in folders for name in ("cu13/lib", "cublas/lib", "cuda_nvrtc/lib")]
        places += [pathlib.Path(home) / "lib64"] if home else []
        has = lambda place: any(place.glob("libcublasLt.so*")) or any(place.glob("libnvrtc.so*"))
        return [place for place in places if has(place)]

    def program(self, name):
        path = self.bin / name
        if not path.exists():
            raise Skipped(f"{path} is not there: pack.py with that part, or --bin")
        return path

    def left(self):
        return self.deadline - time.monotonic()

    def spawn(self, command, env=None, cwd=None, *, output):
        child = subprocess.Popen([str(word) for word in command], stdout=output, stderr=subprocess.STDOUT,
                                 cwd=cwd or self.root, env={**self.env, **(env or {})}, start_new_session=True)
        with self.lock:
            self.started.add(child.pid)
        return child

    def end(self, *children):
        """Processes and what they started."""
        with self.lock:
            ours = {child.pid for child in children} & self.started
            self.started -= ours
        end_sessions(ours)
        for child in children:
            # One that a device holds ends when that lets it.
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(END_SECONDS)

    def end_all(self):
        with self.lock:
            ours, self.started = self.started, set()
        end_sessions(ours)

    def run(self, command, env=None, cwd=None, seconds=None):
        """Its status and what it said; `Failed` if it takes longer than the step may."""
        limit = max(1.0, min(self.left(), seconds or self.left()))
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            child = self.spawn(command, env, cwd, output=output)
            is_late = False
            try:
                child.wait(limit)
            except subprocess.TimeoutExpired:
                is_late = True
            self.end(child)
            output.seek(0)
            text = output.read()
        line = " ".join(str(word) for word in command)
        self.say(f"$ {line}\n{text}")
        if is_late:
            raise Failed(f"still running after {limit:.0f} s: {line[:120]}; its last words: {text[-200:].strip()}")
        return child.returncode, text

    def check(self, command, **more):
        """What it said; `Failed` if its status is not 0."""
        status, text = self.run(command, **more)
        if status != 0:
            lines = [line for line in text.splitlines() if line.strip()]
            telling = [line for line in lines if "FAILED" in line or "panicked" in line or "error" in line.lower()]
            said = " | ".join((telling or lines)[-3:])[:400]
            raise Failed(f"{pathlib.Path(str(command[0])).name} ended with status {status}: {said}")
        return text

    def say(self, text):
        with self.lock:
            self.log.append(text)

    def figure(self, step, title, value):
        """Keeps what was measured: JSON as it is, text as it was printed."""
        path = self.out / "figures.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        kept.setdefault(step, {})[title] = value
        write(path, json.dumps(kept, indent=1))
        lines = []
        for name, titles in kept.items():
            for title, text in titles.items():
                lines += [f"## {name}: {title}", text, ""] if isinstance(text, str) else []
        write(self.out / "figures.txt", "\n".join(lines))

    def once(self, key, make):
        with self.lock:
            is_there = key in self.cache
        if not is_there:
            self.cache[key] = make()
        return self.cache[key]


def of_sessions(sessions):
    """Processes of these sessions that have not ended. A child of ours leads one, and what it starts stays in it, also
    in a process group of its own."""
    found = []
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            # Behind the name, which may have any characters: state, parent, group, session.
            state, _, _, session = stat.read_text(errors="replace").rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue  # it ended meanwhile
        if int(session) in sessions and state not in "ZX":
            found.append(int(stat.parent.name))
    return found


def end_sessions(sessions):
    """Told to end, and killed if that takes them long."""
    for how, seconds in (signal.SIGTERM, END_SECONDS), (signal.SIGKILL, 10):
        limit = time.monotonic() + seconds
        told = set()
        while sessions and time.monotonic() < limit:
            pids = of_sessions(sessions)
            if not pids:
                return
            # Also those that were started meanwhile.
            for pid in set(pids) - told:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, how)
            told.update(pids)
            time.sleep(0.05)


def write(path, text):
    """Never half of it, and never more than comes back."""
    draft = path.with_suffix(".tmp")
    draft.write_text(text[-FILE_BYTES_MAX:])
    draft.replace(path)


def in_parallel(work, items, num=8):
    """What `work` returns for each; the first failure is raised when all have ended."""
    with concurrent.futures.ThreadPoolExecutor(num) as pool:
        futures = [pool.submit(work, item) for item in items]
    return [future.result() for future in futures]


def table(results, steps):
    lines = [f"{'step':<22}{'outcome':<10}{'seconds':>8}  what"]
    for name, result in results.items():
        lines.append(f"{name:<22}{result['outcome']:<10}{result['seconds']:>8.1f}  {result['what']}")
    count = lambda outcome: sum(result["outcome"] == outcome for result in results.values())
    seconds = sum(result["seconds"] for result in results.values())
    left = sum(step.name not in results for step in steps)
    counts = f"{count('passed')} passed, {count('FAILED')} failed, {count('SKIPPED')} skipped, {left} left"
    lines.append(f"{counts}; {seconds:.0f} s")
    return "\n".join(lines)


def run_step(machine, step, seconds):
    machine.deadline, machine.log = time.monotonic() + seconds, []
    start = time.monotonic()
    try:
        if lack := step.lack(machine):
            raise Skipped(lack)
        outcome, what = "passed", step.run(machine) or ""
    except Skipped as reason:
        outcome, what = "SKIPPED", str(reason)
    except Failed as reason:
        outcome, what = "FAILED", str(reason)
    except Exception as error:  # a mistake of a step must not cost the steps behind it
        machine.say(traceback.format_exc())
        outcome, what = "FAILED", f"{type(error).__name__}: {error}"
    machine.end_all()
    with (machine.out / "log.txt").open("a") as log:
        text = "\n".join(machine.log)[-LOG_BYTES_MAX:]
        if log.tell() + len(text) < FILE_BYTES_MAX:
            log.write(f"\n===== {step.name}: {outcome}\n{text}\n")
    return {"outcome": outcome, "seconds": round(time.monotonic() - start, 1), "what": " ".join(what.split())[:600]}


def main():
    import steps as todo

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="the steps, and ends")
    parser.add_argument("--steps", type=lambda text: text.split(","), help="these, in the order of the list")
    parser.add_argument("--group", action="append", choices=todo.GROUPS, help="the steps of a group, beside --steps")
    parser.add_argument("--seconds", type=float, default=570, help="of all steps together")
    parser.add_argument("--pack", type=pathlib.Path, help="folder that pack.py made")
    parser.add_argument("--bin", type=pathlib.Path, help="folder of programs, named as in a pack")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("/tmp/tandem-gpu"),
                        help="a folder for models and what is unpacked, kept between calls")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(os.environ.get("OUT", "gpu-results")))
    parser.add_argument("--done", type=pathlib.Path, help="an earlier results.json: what passed is not run again")
    parser.add_argument("--again", action="store_true", help="also what has passed")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--python", default=sys.executable, help="Python that has PyTorch and Transformers")
    parser.add_argument("--cuda-lib", type=pathlib.Path, help="folder of libcublasLt and libnvrtc, if it is not found")
    parser.add_argument("--shape", default="8b", help="of the model that is measured: a shape of `tandem model random`")
    parser.add_argument("--tiny", action="store_true", help="all sizes small and limits long, to try the steps out")
    args = parser.parse_args()
    if args.list:
        for step in todo.STEPS:
            print(f"{step.name:<22}{step.group:<13}{step.seconds:>5} s  {step.about}")
        return
    if unknown := set(args.steps or []) - {step.name for step in todo.STEPS}:
        sys.exit(f"run: no step {', '.join(sorted(unknown))}; --list names them")
    steps, groups = args.steps or [], args.group or ([] if args.steps else todo.GROUPS)
    chosen = [step for step in todo.STEPS if step.name in steps or step.group in groups]
    start, machine = time.monotonic(), Machine(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("run: ended by a signal"))
    path = machine.out / "results.json"
    results = {}
    for earlier in filter(None, [args.done, path]):
        if earlier.exists():
            results |= json.loads(earlier.read_text())
    try:
        for step in chosen:
            has_passed = results.get(step.name, {}).get("outcome") == "passed"
            # On another machine what an earlier run has made is not there.
            if has_passed and step.is_there(machine) and not args.again:
                continue
            left, limit = args.seconds - (time.monotonic() - start), step.seconds * (4 if args.tiny else 1)
            if left < step.seconds / 3:
                print(f"{step.name}: left, {left:.0f} s are not enough", flush=True)
                continue
            results[step.name] = run_step(machine, step, min(limit, left))
            print(f"{step.name}:", "{outcome} ({seconds} s) {what}".format(**results[step.name]), flush=True)
            write(path, json.dumps(results, indent=1))
            write(machine.out / "table.txt", table(results, chosen))
    finally:
        machine.end_all()
    print(table(results, chosen))
    sys.exit(any(result["outcome"] == "FAILED" for result in results.values()))


if __name__ == "__main__":
    # Steps refer to this module by its name, not as the program that was started.
    sys.modules["run"] = sys.modules["__main__"]
    main()

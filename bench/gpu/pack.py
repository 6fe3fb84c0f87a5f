#!/usr/bin/env python3
"""Collects what a machine with a GPU and without Rust needs for bench/gpu/run.py, in one folder.

    python3 bench/gpu/pack.py                                 builds with --release into target/gpu-pack
    python3 bench/gpu/pack.py --nixl FOLDER                   with NIXL, which pip installed to FOLDER
    python3 bench/gpu/pack.py --parts kernels --profile dev   some of it

| part | what |
|---|---|
| tandem | the program with the feature `cuda` |
| kernels | `cuda_devices`, `cuda_kernels`, and the tests of the crate |
| engine | the tests of the CUDA engine |
| kernel-tests | the tests of kernels/cuda/host as programs for compute capability 9.0, which need no nvcc there |
| sources | kernels for nvcc with their tests, scripts, checkpoints, the demo model |

Needs CUDA_HOME (kernels/cuda/install-nvcc). Programs are stripped; all of it is one archive, pack.tar.xz, which run.py
unpacks, beside manifest.json and copies of the scripts. Ends with a status that is not 0 if that is more than
--max-mib.
"""
import argparse
import concurrent.futures
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXAMPLES = ("cuda_devices", "cuda_kernels")
ENGINE_TESTS = ("cuda", "cuda_core", "cuda_graphs", "cuda_quantized")
PARTS = ["tandem", "kernels", "engine", "kernel-tests", "sources"]
RUNBOOK = ("run.py", "steps.py", "needs.py", "nodes.py")
SOURCES = ("kernels/cuda", "bench/gpu", "bench/peers", "bench/splitting", "tests/checkpoints", "models")
# NIXL's wheel: the library and what it loads.
NIXL_FOLDERS = (".nixl_cu12.mesonpy.libs", "nixl_cu12.libs")


def cargo(profile, *words):
    """Builds, and returns where what was built lies, by name."""
    command = ["cargo", *words, "--profile", profile, "--message-format=json-render-diagnostics"]
    print("+", " ".join(command), flush=True)
    built = {}
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    for line in done.stdout.splitlines():
        message = json.loads(line)
        if message.get("executable"):
            built[message["target"]["name"]] = pathlib.Path(message["executable"])
        if message["reason"] == "build-script-executed":
            # The host as a device, which some tests are about whatever the machine has.
            library = dict(message["env"]).get("TANDEM_FIBRES_LIBRARY")
            built |= {"fibres": pathlib.Path(library)} if library else {}
    return built


def build(args):
    """What goes into bin/, by its name there."""
    found = {}
    if args.tandem:
        found["tandem"] = args.tandem
    elif "tandem" in args.parts:
        found["tandem"] = cargo(args.profile, "build", "--features", "cuda", "--bin", "tandem")["tandem"]
    if "kernels" in args.parts:
        features = ["-p", "kernels", "--features", "cuda,fibres"]
        built = cargo(args.profile, "build", *features, *(word for name in EXAMPLES for word in ("--example", name)))
        found |= {name: built[name] for name in EXAMPLES}
        built = cargo(args.profile, "test", *features, "--lib", "--no-run")
        found |= {"test-kernels": built["kernels"], "libfibres.so": built["fibres"]}
    if "engine" in args.parts:
        tests = [word for name in ENGINE_TESTS for word in ("--test", name)]
        built = cargo(args.profile, "test", "-p", "engine", "--features", "cuda", *tests, "--no-run")
        found |= {f"test-{name}": built[name] for name in ENGINE_TESTS} | {"libfibres.so": built["fibres"]}
    return found


def kernel_tests(scratch):
    """As kernels/cuda/check builds them."""
    nvcc = pathlib.Path(os.environ.get("CUDA_HOME", "")) / "bin/nvcc"
    if not nvcc.exists():
        sys.exit("pack: no nvcc: CUDA_HOME=$(kernels/cuda/install-nvcc)")
    def one(source):
        program = scratch / source.name.replace("_test.cpp", ".gpu")
        flags = ["-O3", "-std=c++17", "-fmad=false", "-x", "cu", "-gencode=arch=compute_90a,code=sm_90a"]
        subprocess.run([str(nvcc), *flags, str(source), "-o", str(program)], check=True)
        return program
    names = subprocess.run([sys.executable, str(ROOT / "kernels/cuda/check"), "names"], check=True, text=True,
                           stdout=subprocess.PIPE).stdout.split()
    sources = [ROOT / f"kernels/cuda/host/{name}_test.cpp" for name in names]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, sources))


def nixl(folder):
    found = [path for name in NIXL_FOLDERS for path in (folder / name).rglob("*") if path.is_file()]
    if not any(path.name == "libnixl_capi.so" for path in found):
        sys.exit(f"pack: {folder} has no {NIXL_FOLDERS[0]}/libnixl_capi.so: pip install nixl-cu12 --target it")
    return found


def tracked(under):
    listed = subprocess.run(["git", "ls-files", "-z", "--", *under], cwd=ROOT, check=True, stdout=subprocess.PIPE)
    return [path for path in listed.stdout.decode().split("\0") if path and (ROOT / path).is_file()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=pathlib.Path, default=ROOT / "target/gpu-pack")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=PARTS)
    parser.add_argument("--profile", default="release")
    parser.add_argument("--tandem", type=pathlib.Path, help="this program instead of building one")
    parser.add_argument("--nixl", type=pathlib.Path, help="the folder that nixl-cu12 was installed to")
    parser.add_argument("--max-mib", type=float, default=50, help="of the folder that is carried to the machine")
    args = parser.parse_args()
    args.into.mkdir(parents=True, exist_ok=True)
    archive = args.into / "pack.tar.xz"
    sizes = {}
    with tempfile.TemporaryDirectory() as scratch, tarfile.open(archive, "w:xz") as tar:
        def add(path, name):
            tar.add(path, name, recursive=False)
            sizes[name] = path.stat().st_size
        for name, path in build(args).items():
            stripped = pathlib.Path(scratch) / name
            shutil.copy2(path, stripped)
            subprocess.run(["strip", str(stripped)], check=True)
            add(stripped, f"bin/{name}")
        if "kernel-tests" in args.parts:
            for path in kernel_tests(pathlib.Path(scratch)):
                add(path, f"gpu-tests/{path.name}")
        if "sources" in args.parts:
            for path in tracked(SOURCES):
                add(ROOT / path, path)
        if args.nixl:
            for path in nixl(args.nixl):
                add(path.resolve(), f"nixl/{path.relative_to(args.nixl)}")
    for script in RUNBOOK:
        shutil.copy2(ROOT / "bench/gpu" / script, args.into / script)
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout.strip()
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    manifest = {"commit": commit, "profile": args.profile, "sha256": digest, "files": sizes}
    (args.into / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    mib = lambda num_bytes: f"{num_bytes / (1 << 20):.1f} MiB"
    for name, size in sizes.items():
        if name.startswith("bin/"):
            print(f"{name:<28}{mib(size):>12}")
    for top in ("gpu-tests", "kernels", "bench", "tests", "models", "nixl"):
        if total := sum(size for name, size in sizes.items() if name.startswith(f"{top}/")):
            print(f"{top + '/':<28}{mib(total):>12}")
    total = sum(path.stat().st_size for path in args.into.iterdir())
    print(f"{str(args.into) + ', packed':<28}{mib(total):>12}")
    if total > args.max_mib * (1 << 20):
        sys.exit(f"pack: more than {args.max_mib} MiB: leave parts out (--parts), or NIXL")


if __name__ == "__main__":
    main()

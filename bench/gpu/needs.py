"""What steps need: a GPU, tools, what other steps have made. Each need is `None`, or says what is not there."""
import pathlib
import re
import shutil

HOPPER = "9.0"


def gpus(m):
    """What cuda_devices says, or why there is no GPU."""
    def ask():
        status, text = m.run([m.program("cuda_devices")], seconds=60)
        last = (text.strip().splitlines() or ["no GPU"])[-1]
        return (text, None) if status == 0 and "cuda:0" in text else ("", last)
    return m.once("gpus", ask)


def capability(m):
    found = re.search(r"compute capability (\d+\.\d+)", gpus(m)[0])
    return found.group(1) if found else "none"


def has_transformers(m):
    def ask():
        status, _ = m.run([m.args.python, "-c", "import torch, transformers; torch.zeros(1).cuda()"], seconds=120)
        return None if status == 0 else f"{m.args.python} has no PyTorch with this GPU and Transformers (--python)"
    return m.once("transformers", ask)


def nixl_library(m):
    return next(m.root.glob("nixl/**/libnixl_capi.so"), None)


def sanitizer(m):
    path = pathlib.Path(m.env.get("CUDA_HOME", "/none")) / "bin/compute-sanitizer"
    return path if path.exists() else shutil.which("compute-sanitizer")


def shape(m):
    return "tiny" if m.args.tiny else m.args.shape


def folder(m):
    return m.work / f"model-{shape(m)}"


def has_model(m):
    """The template is written last."""
    return (folder(m) / "chat_template.jinja").exists()


def ready_test(m, name):
    """What pack.py has compiled for compute capability 9.0."""
    path = m.root / f"gpu-tests/{name}.gpu"
    return path if path.exists() and capability(m) == HOPPER else None


def has_tests(m):
    """Whether tests of kernels can be run: as they were packed, or compiled here."""
    is_ready = (m.root / "gpu-tests").exists() and capability(m) == HOPPER
    return None if is_ready or "CUDA_HOME" in m.env else "no tests for this GPU in the pack, and no nvcc (CUDA_HOME)"


NEEDS = {
    "gpu": lambda m: gpus(m)[1],
    "two gpus": lambda m: None if "cuda:1" in gpus(m)[0] else "there is one GPU",
    "hopper": lambda m: None if capability(m) == HOPPER else f"it is for {HOPPER}, not {capability(m)}",
    "tests": has_tests,
    "nvcc": lambda m: None if "CUDA_HOME" in m.env else "no nvcc: set CUDA_HOME",
    "sanitizer": lambda m: None if sanitizer(m) else "no compute-sanitizer, in CUDA_HOME or PATH",
    "transformers": has_transformers,
    "nixl": lambda m: None if nixl_library(m) else "the pack has no NIXL (pack.py --nixl)",
    "model": lambda m: None if has_model(m) else "the step `model` has not written the model",
}

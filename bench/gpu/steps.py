"""The steps of docs/gpu-todo.md, the most valuable first, each with what it lacks, its limit and its check."""
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import threading
import time
import typing

from needs import NEEDS, folder, has_model, nixl_library, ready_test, sanitizer, shape
from nodes import Nodes, prompt
from run import Failed, Skipped, in_parallel

GROUPS = ("correctness", "figures", "handover", "more")


@dataclasses.dataclass
class Step:
    name: str
    group: str
    seconds: int
    about: str
    run: typing.Callable
    needs: tuple
    is_there: typing.Callable  # whether what later steps need of it is on this machine

    def lack(self, machine):
        """The first thing that it needs and that is not there, as a sentence."""
        return next((reason for need in self.needs if (reason := NEEDS[need](machine))), None)


STEPS = []


def step(name, group, seconds, about, needs=("gpu",), is_there=lambda machine: True):
    def added(run):
        STEPS.append(Step(name, group, seconds, about, run, needs, is_there))
        return run
    return added


# Correctness.

@step("devices", "correctness", 60, "the driver takes what is embedded; cuBLASLt is found", ())
def devices(m):
    text = m.check([m.program("cuda_devices")])
    if "cuda:0" not in text:
        raise Failed(f"no GPU was listed: {text.strip()}")
    if "cuBLASLt is there" not in text:
        folders = m.env["LD_LIBRARY_PATH"] or "no folder"
        raise Failed(f"libcublasLt was not found in {folders} (--cuda-lib): {text.strip()}")
    return text


def driver_tests(m, *chosen):
    """Those that need a GPU; one is a part of another, which runs it."""
    flags = ["--ignored", "--test-threads=1", "--nocapture", "--skip", "opens_what_was_exported"]
    text = m.check([m.program("test-kernels"), *flags, *chosen], env=m.test_environment())
    # The last: a test that runs another process shows what that says, too.
    num = re.findall(r"(\d+) passed", text)[-1:]
    if num in ([], ["0"]):
        raise Failed("no test was run")
    told = [line for line in text.splitlines() if "same bits" in line or "are the same" in line]
    return "; ".join([f"{num[0]} tests", *told])


@step("driver", "correctness", 60, "copies, graphs, launches that overlap, cuBLASLt, memory of another process")
def driver(m):
    return driver_tests(m, "--skip", "warpgroups")


def check_gpu(m, names):
    """The test of each, by `kernels/cuda/check gpu` if it is not ready, with a limit for each: one that hangs costs no
    other."""
    def one(name):
        try:
            if ready := ready_test(m, name):
                num = m.check([ready], seconds=60).count("ok ")
                return name, None if num else "has no tests"
            text = m.check([m.args.python, "kernels/cuda/check", "gpu", name], seconds=150)
        except Failed as reason:
            return name, str(reason)
        passed = re.search(r"(\d+) passed, 0 failed", text)
        return name, None if passed and passed.group(1) != "0" else f"said {text.strip()[-100:]}"
    # They take managed memory, of which many programs at once may take more than is good for a GPU.
    outcomes = in_parallel(one, names, 4)
    if bad := [f"{name}: {reason}" for name, reason in outcomes if reason]:
        raise Failed(f"{len(bad)} of {len(outcomes)} failed: {'; '.join(bad)}")
    return f"{len(outcomes)} passed: {', '.join(names)}"


def test_names(m):
    return m.once("tests", lambda: m.check([m.args.python, "kernels/cuda/check", "names"], seconds=30).split())


@step("kernels", "correctness", 200, "kernels against their references (kernels/cuda/check gpu)", ("gpu", "tests"))
def kernels(m):
    # One alone first: where that fails, the others would only take longer to say so.
    first = "digest"
    try:
        check_gpu(m, [first])
    except Failed as reason:
        raise Failed(f"{reason}; so the others are not run") from reason
    return f"{first} alone, " + check_gpu(m, [name for name in test_names(m) if "hopper" not in name and name != first])


HOPPER_TESTS = ("gpu", "hopper", "tests")


@step("hopper-instructions", "correctness", 90, "boxes, swizzle, descriptors, products of warpgroups", HOPPER_TESTS)
def hopper_instructions(m):
    return check_gpu(m, ["hopper"])


@step("hopper-kernels", "correctness", 150, "attention of prompts by warpgroups, against its reference", HOPPER_TESTS)
def hopper_kernels(m):
    return check_gpu(m, [name for name in test_names(m) if "hopper" in name and name != "hopper"])


@step("hopper-driver", "correctness", 60, "the same by the driver, beside the portable kernel", ("gpu", "hopper"))
def hopper_driver(m):
    return driver_tests(m, "warpgroups")


def engine_tests(m, name, **more):
    env = {"TANDEM_TEST_DEVICE": m.args.device, **m.test_environment(), **more}
    text = m.check([m.program(f"test-{name}"), "--test-threads=4"], env=env)
    return re.search(r"\d+ passed", text).group(0)


for test, about in (
    ("cuda", "golden tokens, logits, sampling, pool, hand-over"),
    ("cuda_graphs", "graphs: tokens and KV of direct launches; --enforce-eager"),
    ("cuda_core", "the engine's loop"),
    ("cuda_quantized", "weights of 8 and 4 bits"),
):
    step(f"engine-{test.replace('_', '-')}", "correctness", 90, about)(lambda m, test=test: engine_tests(m, test))


@step("engine-pdl", "correctness", 120, "the engine's tests and graphs with --enable-pdl", ("gpu", "hopper"))
def engine_pdl(m):
    return ", ".join(engine_tests(m, name, TANDEM_TEST_PDL="1") for name in ("cuda", "cuda_graphs"))


QUESTION = ("The code of Nora is 7391. Hugo lives in Oslo. The code of Omar is 2864. Kate owns the lamp. "
            "What is the code of Nora?")


@step("program", "correctness", 60, "prefill and decode node on the GPU answer the demo's question; over quic")
def program(m):
    with Nodes(m, "models/demo", f"--device {m.args.device} {SMALL} --kv-transports quic") as nodes:
        messages = [{"role": "user", "content": QUESTION}]
        body = {"model": "models/demo", "messages": messages, "max_tokens": 32, "temperature": 0}
        text = nodes.ask("/v1/chat/completions", body)["choices"][0]["message"]["content"]
        if "7391" not in text:
            raise Failed(f"the answer is {text!r}, the right one has 7391")
        log = nodes.log("decode-0")
        if not re.search(r"numerics=\"?cuda-", log):
            raise Failed("the log names no numerics of a GPU")
        return f"{text.strip()!r}, {int(nodes.arrived('quic'))} bytes over quic"


# KV of the demo model; two nodes share a GPU.
SMALL = "--kv-cache-memory-bytes 256MiB --log-level info"


def same_answers(m, transport, flags="", second=None, env=None):
    """The decode node's answers with KV over `transport` are those over quic, and KV came that way."""
    found = {}
    for kinds in ("quic", f"quic,{transport}"):
        way = kinds.split(",")[-1]
        decode_flags = f"--device {second or m.args.device}"
        both = f"{SMALL} --kv-transports {kinds} {flags}"
        with Nodes(m, "models/demo", both, f"--device {m.args.device}", decode_flags, env=env) as nodes:
            lengths = (40, 90) if m.args.tiny else (40, 500, 1500)
            found[way] = [nodes.complete(prompt(num, num, 300), 24) for num in lengths]
            if not (num_bytes := nodes.arrived(way)):
                raise Failed(f"no KV came over {way}: {reason_against(nodes, way)}")
            if refused := nodes.metric("tandem_refused_extents_total"):
                raise Failed(f"{refused:.0f} extents were refused over {way}")
    if found["quic"] != found[transport]:
        raise Failed(f"answers over {transport} differ from those over quic: {found}")
    return f"same answers as over quic, {num_bytes / 1e6:.1f} MB over {transport}"


def reason_against(nodes, way):
    lines = [line for name in nodes.children for line in nodes.log(name).splitlines()]
    lines = [line for line in lines if way in line and ("WARN" in line or "does not" in line)]
    return lines[-1][-300:] if lines else "no log says why"


@step("cuda-ipc", "correctness", 60, "two processes on one GPU: answers and KV over cuda-ipc")
def cuda_ipc(m):
    return same_answers(m, "cuda-ipc")


@step("nixl", "correctness", 60, "the same over NIXL", ("gpu", "nixl"))
def nixl(m):
    flags = f"--nixl-library {nixl_library(m)}"
    return same_answers(m, "nixl", flags, env={"UCX_LOG_LEVEL": "warn"})


ON_MODEL = ("gpu", "model")


@step("model", "figures", 150, "random weights in the shape that is measured", (), has_model)
def model(m):
    return m.check([m.program("tandem"), "model", "random", shape(m), folder(m)])


# Figures.

def table_of(m, name, title, command, seconds=None):
    """Runs `tandem bench engine`, keeps its table and JSON, and returns the rows."""
    result = m.work / f"{name}.json"
    result.unlink(missing_ok=True)
    text = m.check([*command, "--save-result", result], seconds=seconds)
    m.figure(name, f"{title}, table", text)
    found = json.loads(result.read_text())
    m.figure(name, title, found)
    return found["rows"]


def bench_engine(m, name, title, *flags, prompts, batches, model=None, rounds=3):
    sizes = ["--context", 512, "--num-tokens", 192]
    if m.args.tiny:
        prompts, batches, rounds = "24", "1,2", 1
        sizes = ["--context", 20, "--num-tokens", 24, "--limit-copy-bytes", "1MiB", "--limit-product", 32]
    rows = ["--prompt-len", prompts, "--batch", batches]
    command = [m.program("tandem"), "bench", "engine", "--device", m.args.device, "--model", model or folder(m)]
    command += ["--dtype", "bfloat16"]
    return table_of(m, name, title, [*command, *rows, *sizes, "--rounds", rounds, *flags])


def shares(rows):
    middle = statistics.median
    name = lambda row: f"prefill {row['num_tokens']}" if row["phase"] == "prefill" else f"decode {row['batch']}"
    said = []
    for row in rows:
        text = f"{name(row['row'])}: {middle(row['tokens_per_second']):.0f} tok/s, {middle(row['share_of_limit']):.0%}"
        for peer in row["peers"]:
            if peer["this_over_peer"]:
                text += f", {peer['this_over_peer']['ratio']:.2f}x {peer['name']}"
        said.append(text)
    return "; ".join(said)


def goals(rows):
    """The goals of the engine on a GPU that rows of the 8B shape miss."""
    missed = []
    for row in rows:
        share = statistics.median(row["share_of_limit"])
        if row["row"]["phase"] == "decode" and row["row"]["batch"] == 1 and share < 0.8:
            missed.append(f"decode at batch 1 has {share:.0%} of its limit, wanted 80 %")
        if row["row"]["phase"] == "prefill" and share < 0.5:
            missed.append(f"a prompt of {row['row']['num_tokens']} has {share:.0%}, wanted 50 %")
    return "; GOALS MISSED: " + ", ".join(missed) if missed else "; goals met"


ALL_ROWS = {"prompts": "512,2048,8192,32768", "batches": "1,8,64"}


@step("engine", "figures", 150, "decode at 1, 8, 64, prefill at 512 to 32k, beside the limits", ON_MODEL)
def engine(m):
    rows = bench_engine(m, "engine", "rows", **ALL_ROWS)
    return shares(rows) + goals(rows)


@step("kernels-alone", "figures", 150, "attention, products, sampling, staging alone (the example cuda_kernels)")
def kernels_alone(m):
    small = ("--smaller 64 --prompt-len 64 --batch 1 --context 16 --rows 1 --library-rows 32 --samples 1 "
             "--extent-kib 64 --rotate-mib 1 --copy-mib 1 --product 16 --millis 1 --launches 2")
    flags = shlex.split(small) if m.args.tiny else []
    text = m.check([m.program("cuda_kernels"), "--device", m.args.device, *flags])
    m.figure("kernels-alone", "table", text)
    return f"{len(text.splitlines())} lines in figures.txt"


@step("engine-transformers", "figures", 240, "the same rows beside Transformers", ("gpu", "model", "transformers"))
def engine_transformers(m):
    flags = ["--transformers-python", m.args.python]
    return shares(bench_engine(m, "engine-transformers", "rows", *flags, rounds=2, **ALL_ROWS))


@step("engine-256", "figures", 100, "decode at batch 256", ON_MODEL)
def engine_256(m):
    return shares(bench_engine(m, "engine-256", "rows", prompts="512", batches="256"))


@step("hopper-prefill", "figures", 100, "prefill by warpgroups (--prefill-attention auto)", ("gpu", "model", "hopper"))
def hopper_prefill(m):
    flags = ["--prefill-attention", "auto"]
    rows = bench_engine(m, "hopper-prefill", "rows", *flags, prompts="2048,8192,32768", batches="1")
    return shares(rows) + goals(rows)


@step("enforce-eager", "figures", 80, "what graphs save: the same without them", ON_MODEL)
def enforce_eager(m):
    return shares(bench_engine(m, "enforce-eager", "rows", "--enforce-eager", prompts="512", batches="1,8"))


@step("pdl", "figures", 80, "launches that overlap: the same with --enable-pdl", ("gpu", "model", "hopper"))
def pdl(m):
    return shares(bench_engine(m, "pdl", "rows", "--enable-pdl", prompts="512", batches="1,8,64"))


@step("batch-invariant", "figures", 100, "the price of --batch-invariant", ON_MODEL)
def batch_invariant(m):
    rows = bench_engine(m, "batch-invariant", "rows", "--batch-invariant", prompts="2048,8192", batches="1,8,64")
    return shares(rows)


@step("quantized", "figures", 200, "W8A8, q8_0, q4_0, q4_K_M beside bf16 (shape M): decode, prompts of W8A8")
def quantized(m):
    plain, said = m.work / "model-m", []
    tandem = m.program("tandem")
    m.check([tandem, "model", "random", "tiny" if m.args.tiny else "m", plain])
    def measure(ty, path, prompts):
        rows = bench_engine(m, "quantized", ty, model=path, prompts=prompts, batches="1,16")
        said.append(f"{ty}: {shares(rows)}")
    measure("bf16", plain, "2048,8192")
    w8a8 = m.work / "m-w8a8"
    shutil.rmtree(w8a8, ignore_errors=True)  # what is there is not written over
    m.check([tandem, "model", "w8a8", plain, w8a8])
    measure("w8a8", w8a8, "2048,8192")
    for ty in ("q8_0", "q4_0", "q4_k_m"):
        path = m.work / f"m-{ty}.gguf"
        m.check([tandem, "model", "gguf", plain, path, "--type", ty])
        measure(ty, path, "512")
    return "; ".join(said)


def handover(m, transports, flags):
    results = m.work / "handover"
    lengths, rounds, requests = ("256", 1, 4) if m.args.tiny else ("8192", 2, 6)
    cores = ["--beside", "0-3", "--prefill-cores", "4-9", "--decode-cores", "10-15"] if os.cpu_count() >= 16 else []
    sizes = ["--kv-bytes", "3GiB", "--step-tokens", 2048]
    if m.args.tiny:
        sizes = ["--kv-bytes", "300MiB", "--step-tokens", 128]
    command = [m.args.python, "bench/splitting/run.py", "handover", "--tandem", m.program("tandem"), "--out", results,
               "--model", folder(m), "--device", m.args.device, "--lengths", lengths, "--rounds", rounds,
               "--requests", requests, *cores, *sizes, f"--node-flags={flags}", "--transports", *transports]
    text = m.check(command)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    m.figure("handover", "table", "\n".join(rows))
    if len(rows) - 1 < len(transports):
        raise Failed(f"{len(rows) - 1} rows for {len(transports)} transports")
    return " ".join(rows[1:])


@step("handover", "handover", 300, "8k tokens over quic, cuda-ipc, and nixl if it is there", ON_MODEL)
def handover_step(m):
    library = nixl_library(m)
    ways = ["quic", "quic,cuda-ipc"] + (["quic,nixl"] if library else [])
    return handover(m, ways, f"--nixl-library {library}" if library else "")


def long_prompt(m):
    return 150 if m.args.tiny else 32_000


def big_flags(m):
    kv = "300MiB" if m.args.tiny else "5GiB"
    longest = long_prompt(m) + 200
    return f"--device {m.args.device} --kv-cache-memory-bytes {kv} --max-model-len {longest} --log-level info"


def prefill_node_goes(m, how):
    """A prompt is computed by a prefill node that goes when the first of its KV has come: the answer comes all the
    same, and the next one, too."""
    config = json.loads((folder(m) / "config.json").read_text())
    vocab, num_tokens = config["vocab_size"], long_prompt(m)
    # K and V in bf16.
    all_bytes = 4 * num_tokens * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    with Nodes(m, folder(m), f"{big_flags(m)} --kv-transports quic,cuda-ipc") as nodes:
        # So that what a first request waits for is there.
        nodes.complete(prompt(64, 1, vocab), 4)
        before, come, answer = nodes.arrived("cuda-ipc"), 0, {}
        tokens = prompt(num_tokens, 2, vocab)
        asking = threading.Thread(target=lambda: answer.update(text=nodes.complete(tokens, 8)))
        asking.start()
        while asking.is_alive() and come <= 0:
            time.sleep(0.002)
            come = nodes.arrived("cuda-ipc") - before
        nodes.kill("prefill-0", how)
        share, was_early = come / all_bytes, asking.is_alive()
        asking.join()
        if come <= 0:
            raise Failed(f"no KV came over cuda-ipc: {reason_against(nodes, 'cuda-ipc')}")
        if not was_early or share > 0.95:
            raise Failed(f"{share:.0%} of the KV had come when the prefill node went: the prompt is too short")
        if "text" not in answer:
            raise Failed(f"the request was not answered; the decode node: {nodes.log('decode-0')[-400:]}")
        nodes.complete(prompt(100, 3, vocab), 8)
        is_over = nodes.children["decode-0"].poll() is not None
        if is_over or re.search(r"model runner failed|the engine stops", nodes.log("decode-0")):
            raise Failed(f"the decode node's device failed: {nodes.log('decode-0')[-400:]}")
        return f"the decode node went on; {share:.0%} of the KV had come"


@step("prefill-killed", "handover", 120, "cuda-ipc: the prefill node is killed under a long prompt", ON_MODEL)
def prefill_killed(m):
    return prefill_node_goes(m, signal.SIGKILL)


@step("prefill-stopped", "handover", 120, "cuda-ipc: it shuts down in order meanwhile", ON_MODEL)
def prefill_stopped(m):
    return prefill_node_goes(m, signal.SIGTERM)


# More, where there is time.

@step("rebuilt-kernels", "more", 120, "kernels compiled here by nvcc are loaded from their folder", ("gpu", "nvcc"))
def rebuilt_kernels(m):
    into = m.work / "cubins"
    into.mkdir(exist_ok=True)
    sm_90a = "-gencode=arch=compute_90a,code=sm_90a"
    def one(path):
        flags = ["-O3", "-std=c++17", "-fmad=false", "--cubin", sm_90a]
        m.check([f"{m.env['CUDA_HOME']}/bin/nvcc", *flags, path, "-o", into / f"{path.stem}.cubin"])
    in_parallel(one, sorted((m.root / "kernels/cuda").glob("*.cu")))
    return m.check([m.program("cuda_devices")], env={"TANDEM_CUDA_KERNELS": str(into)})


@step("nvrtc", "more", 60, "every kernel compiles by NVRTC", ())
def nvrtc(m):
    text = m.check([m.program("test-kernels"), "nvrtc", "--nocapture"], env=m.test_environment())
    return re.search(r"\d+ passed", text).group(0)


@step("two-gpus", "more", 120, "cuda-ipc from one GPU to another", ("gpu", "two gpus"))
def two_gpus(m):
    return same_answers(m, "cuda-ipc", second="cuda:1")


@step("nixl-without-cuda", "more", 60, "a UCX without CUDA: the warning names it, KV goes over quic", ("gpu", "nixl"))
def nixl_without_cuda(m):
    flags = f"--device {m.args.device} {SMALL} --kv-transports quic,nixl --nixl-library {nixl_library(m)}"
    with Nodes(m, "models/demo", flags, env={"UCX_TLS": "tcp,self"}) as nodes:
        nodes.complete(prompt(500, 1, 300), 8)
        if not nodes.arrived("quic"):
            raise Failed("no KV came over quic")
        return reason_against(nodes, "nixl")


@step("sanitizer", "more", 240, "memcheck and racecheck of kernels", ("gpu", "sanitizer"))
def sanitize(m):
    programs = [ready_test(m, name) or m.work / f"target/cuda-check/{name}.gpu" for name in test_names(m)]
    programs = [path for path in programs if path.exists()]
    if not programs:
        raise Skipped("the step `kernels` has built no program")
    def one(item):
        tool, path = item
        m.check([sanitizer(m), "--tool", tool, "--error-exitcode", "9", path])
    in_parallel(one, [(tool, path) for path in programs for tool in ("memcheck", "racecheck")], 4)
    return f"no error in {len(programs)} programs"


@step("transformers-compile", "more", 240, "decode at batch 1 beside torch.compile", ("gpu", "model", "transformers"))
def transformers_compile(m):
    flags = ["--transformers-python", m.args.python, "--transformers-compile"]
    return shares(bench_engine(m, "transformers-compile", "rows", *flags, prompts="512", batches="1"))

#!/usr/bin/env python3
"""What splitting prefill from decode is worth on this machine, and what it costs: comparisons, one command each.

    cargo build --release
    target/release/tandem model random s /tmp/model-s
    python bench/splitting/run.py interference --tandem target/release/tandem --model /tmp/model-s --out results

| comparison | says |
|---|---|
| interference | p99 ITL of running streams while long prompts keep arriving, over p99 ITL without them |
| price | TTFT of one request at a time, split over colocated on the same cores, by length of the prompt |
| apart | settings that move TTFT and leave ITL, and the reverse |
| goodput | requests per second that meet three pairs of SLOs, on a trace (`--trace`, Mooncake's format) |
| handover | what lies between the end of prefill and the decode node's own steps, by length of the prompt |
| arrivals | ITL of running streams while KV for other requests arrives at the decode node, whose one core does both |
| cost | CPU seconds per 1,000 output tokens, and resident memory |

Set-ups: `split` (prefill node on core 0, decode node on core 1), `one-core` and `two-cores` (one decode node that
prefills by itself), `llama` (`--llama-server` and `--gguf`, written by `tandem model gguf`), `vllm` (`--vllm`, the
program of its CPU build); bench/peers/README.md says how to have the last two. All are started anew for each round,
take turns, and get the same load; the load generator and the proxy run beside the engines, on either core or where
`--beside` says, and what they took is in the results. Nothing else should run meanwhile.
"""
import argparse
import contextlib
import http.client
import json
import pathlib
import statistics
import subprocess
import sys
import threading
import urllib.request

PORT = 18100
# Of the trace's lengths: see `goodput`.
DIVISOR = 16
CONTEXT = 16384
# Tokens of a prompt that nobody has, behind those that the prefill node has: see `arrivals`.
ARRIVALS_TAIL = 32
# Milliseconds to the first token and of the longest gap between two tokens of an answer: see `goodput`. Shape S on
# an idle core needs half a second for a prompt of this trace, and 8 ms for a token.
SLOS = {"tight ITL": (5000, 25), "tight TTFT": (1000, 100), "both": (1000, 25)}


def toml(setups):
    quoted = lambda value: json.dumps(str(value))
    text = ""
    for setup in setups:
        text += f"[[setup]]\nname = {quoted(setup['name'])}\nbase_url = {quoted(setup['url'])}\n"
        text += f"start = [{', '.join(quoted(word) for word in setup['start'])}]\n"
        text += f"flags = [{', '.join(quoted(word) for word in setup['flags'])}]\nready_seconds = 600\n"
        env = ", ".join(f"{key} = {quoted(value)}" for key, value in setup.get("env", {}).items())
        text += f"env = {{ {env} }}\n\n"
    return text


# Whether this user may put processes before others.
MAY_GO_FIRST = subprocess.run(["chrt", "--rr", "1", "true"], stderr=subprocess.DEVNULL).returncode == 0


def beside(args):
    """How the load generator and the proxies are started: on their cores, before anything that computes there if this
    user may. They stand for machines of their own, and a token must not wait for a prefill node's turn on the core to
    end before it is counted."""
    return [*(["chrt", "--rr", "1"] if MAY_GO_FIRST else []), "taskset", "-c", args.beside]


def computing(cores):
    """How whatever computes is started: on its cores, as an ordinary process though the load generator starts it."""
    return ["chrt", "--other", "0", "taskset", "-c", cores]


class Setups:
    """Every set-up of the comparisons, on ports of its own."""

    def __init__(self, args):
        self.args = args
        self.certs = args.out / "certs"
        if not self.certs.exists():
            subprocess.run([args.tandem, "certs", "--dir", self.certs, "--prefill-node", "prefill-0", "--prefill-node",
                            "prefill-1", "--decode-node", "decode-0", "--proxy", "proxy"], check=True,
                           stdout=subprocess.DEVNULL)
        self.num = 0
        # Prompts of `price` and `handover` fit, with what they generate.
        self.context = max(CONTEXT, *(length + 64 for length in args.lengths))

    def ports(self):
        self.num += 1
        return PORT + 10 * self.num

    def tandem(self, name, prefill=("0",), decode="1", threads=1, prefill_flags=(), decode_flags=(), proxy_flags=()):
        """Three roles as processes; `prefill` has the cores of each prefill node, `decode` those of the decode node."""
        port = self.ports()
        common = f"--tls-dir {self.certs} --model {self.args.model} --log-level warn"
        device = f"--device {self.args.device}" if self.args.device else ""
        engine = (f"{common} --kv-cache-memory-bytes {self.args.kv_bytes} --threads {threads} --max-model-len {self.context} "
                  f"{device} {self.args.node_flags}")
        lines, nodes = [], f"--decode-node 127.0.0.1:{port + 1}"
        for index, cores in enumerate(prefill):
            at = port + 2 + index
            lines.append(f"{' '.join(computing(cores))} {self.args.tandem} prefill-node --node-id prefill-{index} --port {at} "
                         f"--metrics-port 0 {engine} {' '.join(prefill_flags)} &")
            nodes += f" --prefill-node 127.0.0.1:{at}"
        lines.append(f"{' '.join(computing(decode))} {self.args.tandem} decode-node --node-id decode-0 --port {port + 1} "
                     f"--metrics-port {port + 5} {engine} {' '.join(decode_flags)} &")
        # The proxy comes last: one that knows the decode node only has it prefill by itself.
        for at in (port + 1, *(port + 2 + index for index in range(len(prefill)))):
            lines.append(f"until grep -qi ':{at:04X} ' /proc/net/udp /proc/net/udp6; do "
                         f"[ $(jobs -r | wc -l) = {1 + len(prefill)} ] || exit 1; sleep 0.1; done")
        lines.append(f"{' '.join(beside(self.args))} {self.args.tandem} proxy --node-id proxy --port {port} {common} {nodes} {' '.join(proxy_flags)} &")
        return {"name": name, "url": f"http://127.0.0.1:{port}", "start": ["bash", "-c", "\n".join([*lines, "wait -n"])],
                "flags": ["--model", self.args.model], "metrics": f"http://127.0.0.1:{port + 5}/metrics"}

    def split(self, name="split", **more):
        cores = {"prefill": (self.args.prefill_cores,), "decode": self.args.decode_cores}
        return self.tandem(name, **{**cores, **more})

    def colocated(self, cores, name=None, chunk=None):
        """One decode node that prefills by itself, in chunks of `chunk` tokens."""
        chunk = chunk or self.args.chunk
        threads = len(cores.split(","))
        flags = (f"--max-num-batched-tokens {chunk}", f"--local-prefill-tokens {chunk}")
        return self.tandem(name or ("one-core" if threads == 1 else "two-cores"), prefill=(), decode=cores,
                           threads=threads, decode_flags=flags)

    def llama(self):
        port = self.ports()
        start = [*computing("0,1"), self.args.llama_server, "-m", self.args.gguf, "--host", "127.0.0.1", "--port", port, "-t", 2, "-tb", 2,
                 "-c", CONTEXT * 8, "--parallel", 8, "--no-webui", "--log-disable", "-fa", "on"]
        return {"name": "llama", "url": f"http://127.0.0.1:{port}", "start": start,
                "flags": ["--model", "m", "--no-keep-alive"]}

    def vllm(self, name="vllm", budget=None):
        port = self.ports()
        start = [*computing("0,1"), self.args.vllm, "serve", self.args.model, "--host", "127.0.0.1", "--port", port, "--dtype", "bfloat16",
                 "--max-model-len", CONTEXT, "--max-num-seqs", 64, "--disable-log-stats"]
        start += ["--max-num-batched-tokens", budget] if budget else []
        env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0-1", "HF_HUB_OFFLINE": "1",
               "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
        # Its own advice for CPUs.
        openmp = pathlib.Path(self.args.vllm).resolve().parent.parent / "lib" / "libiomp5.so"
        env |= {"LD_PRELOAD": openmp} if openmp.exists() else {}
        return {"name": name, "url": f"http://127.0.0.1:{port}", "start": start, "env": env,
                "flags": ["--model", self.args.model]}

    def peers(self):
        found = [self.llama()] if self.args.llama_server else []
        return found + ([self.vllm()] if self.args.vllm else [])


def bench(args, command, name, setups, flags, serve_flags):
    """Runs a `tandem bench` command over set-ups and returns what it wrote; its table goes to the output."""
    if args.only:
        setups = [setup for setup in setups if setup["name"] in args.only]
        assert setups, "--only names none of the set-ups of this comparison"
    path, result = args.out / f"{name}.toml", args.out / f"{name}.json"
    path.write_text(toml(setups))
    vocab = json.loads((pathlib.Path(args.model) / "config.json").read_text())["vocab_size"]
    all_flags = [*beside(args), args.tandem, "bench", command, "--setups", path, "--num-seeds", args.rounds, "--save-result", result,
                 *flags, "--", "--vocab-size", min(vocab, 500), *serve_flags]
    subprocess.run([str(flag) for flag in all_flags], check=True)
    return json.loads(result.read_text())


def interference(args, setups):
    chosen = [setups.split(), setups.colocated("0"), setups.colocated("0,1"), *setups.peers()]
    if args.vllm:
        chosen.append(setups.vllm("vllm-256", 256))
    bench(args, "interference", "interference", chosen,
          ["--prompt-len", args.prompt_len, "--stream-output-len", args.stream_len], ["--num-warmups", 2])


def price(args, setups):
    rows = []
    for length in args.lengths:
        both = setups.split("split", prefill=("0,1",), decode="0,1", threads=2)
        halves = setups.split("split-one-core-each")
        result = bench(args, "compare", f"price-{length}", [setups.colocated("0,1"), both, halves], [],
                       ["--num-prompts", args.requests, "--max-concurrency", 1, "--random-input-len", length,
                        "--random-output-len", 16, "--ignore-eos", "--num-warmups", min(2, args.requests)])
        ratios = result["ratios_to_first"]["median_ttft_ms"]
        mean = lambda index, figure: sum(r[index][figure] for r in result["rounds"]) / len(result["rounds"])
        rows.append([length, f"{mean(0, 'median_ttft_ms'):.1f}", f"{mean(1, 'median_ttft_ms'):.1f}",
                     interval(ratios["split"]), interval(ratios.get("split-one-core-each")),
                     f"{mean(1, 'median_first_gap_ms') / mean(1, 'median_itl_ms'):.2f}"])
    table(["prompt tokens", "TTFT colocated, ms", "TTFT split, ms", "ratio", "ratio, one core each",
           "gap #1 to #2, in ITLs"], rows)


def apart(args, setups):
    def split(name, prefill=(), decode=(), proxy=()):
        return setups.split(name, prefill_flags=prefill, decode_flags=decode, proxy_flags=proxy)

    no_cache = ("--no-enable-prefix-caching",)
    colocated = [setups.colocated("0,1", f"colocated-chunks-of-{chunk}", chunk) for chunk in (64, 128, 512)]
    shared = [
        split("no-prefix-cache", no_cache, no_cache),
        split("prefix-cache-of-the-decode-node", no_cache),
        split("prefix-caches"),
        split("prefill-chunks-of-64", ("--max-num-batched-tokens 64",)),
        split("decode-4-at-a-time", decode=("--max-num-seqs 4",)),
        *colocated,
    ]
    # Prompts of 512 tokens of which three quarters are shared, in bursts.
    apart_table(args, "apart-shared", shared,
                ["--dataset-name", "prefix_repetition", "--prefix-repetition-num-prefixes", 4,
                 "--prefix-repetition-prefix-len", 384, "--prefix-repetition-suffix-len", 128,
                 "--prefix-repetition-output-len", 192])
    short = [
        split("short-prompts-at-the-decode-node", proxy=("--local-prefill-max-tokens 256",),
              decode=("--local-prefill-tokens 256",)),
        split("the-same-in-chunks-of-64", proxy=("--local-prefill-max-tokens 256",),
              decode=("--local-prefill-tokens 64",)),
        split("every-prompt-at-the-prefill-node"),
        split("decode-4-at-a-time", decode=("--max-num-seqs 4",)),
        *colocated,
    ]
    # Prompts of 256 tokens that share nothing, in bursts.
    apart_table(args, "apart-short", short,
                ["--dataset-name", "random", "--random-input-len", 256, "--random-output-len", 192])


def apart_table(args, name, setups, load):
    """What each set-up does to TTFT and ITL, as a ratio to the first."""
    result = bench(args, "compare", name, setups, [],
                   ["--num-prompts", args.requests, "--request-rate", args.rate, "--burstiness", 0.5, "--ignore-eos",
                    "--num-warmups", 2, *load])
    figures = ("median_ttft_ms", "p99_itl_ms", "mean_itl_ms", "mean_e2el_ms")
    first = [[round[0][figure] for round in result["rounds"]] for figure in figures]
    rows = [[result["setups"][0], *(f"{sum(values) / len(values):.1f} ms" for values in first)]]
    rows += [[name, *(interval(result["ratios_to_first"][figure][name]) for figure in figures)]
             for name in result["setups"][1:]]
    table(["setting", "median TTFT", "p99 ITL", "mean ITL", "mean time to the whole answer"], rows)


def goodput(args, setups):
    assert args.trace, "--trace is missing: a file in Mooncake's format"
    chosen = [setups.split(), setups.colocated("0"), setups.colocated("0,1"), *setups.peers()]
    print(f"The first {args.requests} requests of {pathlib.Path(args.trace).name}, lengths divided by {DIVISOR}, "
          f"{args.rate} per second (Poisson).")
    result = bench(args, "compare", "goodput", chosen, [],
                   ["--dataset-name", "mooncake", "--dataset-path", args.trace, "--trace-length-divisor", DIVISOR,
                    "--num-prompts", args.requests, "--request-rate", args.rate, "--ignore-eos", "--save-detailed",
                    "--num-warmups", 2])
    rows = []
    for name, (ttft_max, itl_max) in SLOS.items():
        cells = []
        for index, _ in enumerate(result["setups"]):
            rates = []
            for round in result["rounds"]:
                run = round[index]
                good = sum(not error and ttft * 1e3 <= ttft_max and max(itls, default=0) * 1e3 <= itl_max
                           for ttft, itls, error in zip(run["ttfts"], run["itls"], run["errors"]))
                rates.append((good / run["duration"], good / len(run["ttfts"])))
            cells.append(" / ".join(f"{rate:.2f} ({share:.0%})" for rate, share in rates))
        rows.append([f"{name}: TTFT {ttft_max} ms, ITL {itl_max} ms", *cells])
    table(["objectives", *(f"{name}, good requests/s by round" for name in result["setups"])], rows)


def over_each_transport(setups, decode_flags=()):
    """`split` over each of `--transports`, called by it: the last of each is taken, since both nodes run on one host."""
    step = f"--max-num-batched-tokens {setups.args.step_tokens}"
    flags = {kinds.split(",")[-1]: f"{step} --kv-transports {kinds}" for kinds in setups.args.transports}
    return [setups.split(name, prefill_flags=(flag,), decode_flags=(flag, *decode_flags)) for name, flag in flags.items()]


class Extents(threading.Thread):
    """Looks now and then at what decode nodes that come and go have received."""

    def __init__(self, setups):
        super().__init__(daemon=True)
        self.urls = {setup["name"]: setup["metrics"] for setup in setups}
        self.mean_bytes, self.is_over = {}, threading.Event()

    def run(self):
        while not self.is_over.wait(0.2):
            for name, url in self.urls.items():
                with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
                    lines = urllib.request.urlopen(url, timeout=1).read().decode().splitlines()
                    extents, num_bytes = (sum(float(line.rsplit(" ", 1)[1]) for line in lines
                                              if line.startswith(metric) and 'direction="verified"' in line)
                                          for metric in ("tandem_fabric_extents_total", "tandem_fabric_extent_bytes_total"))
                    if extents:
                        self.mean_bytes[name] = num_bytes / extents

    def of(self, name, num_bytes):
        """In how many extents a hand-over of so many bytes came, and the mean size of one."""
        self.is_over.set()
        mean = self.mean_bytes.get(name)
        return f"{num_bytes / mean:.0f} of {mean / 1024:.0f} KiB" if mean else "not seen"


def token_bytes(args):
    """KV of a token in bf16."""
    config = json.loads((pathlib.Path(args.model) / "config.json").read_text())
    num_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    return 4 * config["num_hidden_layers"] * config.get("num_key_value_heads", num_heads) * head_dim


def handover(args, setups):
    rows = []
    layers = json.loads((pathlib.Path(args.model) / "config.json").read_text())["num_hidden_layers"]
    bytes_of_token = token_bytes(args)
    for length in args.lengths:
        chosen = over_each_transport(setups)
        extents = Extents(chosen)
        extents.start()
        result = bench(args, "compare", f"handover-{length}", chosen, [],
                       ["--num-prompts", args.requests, "--max-concurrency", 1, "--random-input-len", length,
                        "--random-output-len", 32, "--ignore-eos", "--num-warmups", min(2, args.requests // 2), "--save-detailed"])
        for index, name in enumerate(result["setups"]):
            mean = lambda figure: sum(r[index][figure] for r in result["rounds"]) / len(result["rounds"])
            itl, handover = mean("median_itl_ms"), mean("median_handover_ms")
            phases = [request["phases"] for r in result["rounds"] for request in r[index]["requests"]]
            assert all(phase["transfer"] for phase in phases), "the decode node prefilled by itself"
            hidden = statistics.median(hidden_share(**phase) for phase in phases)
            goal = 1 - 1 / (layers * -(-length // args.step_tokens)) - 0.02
            rows.append([length, name, f"{mean('median_prefill_ms'):.1f}", extents.of(name, -(-length // 16) * 16 * bytes_of_token),
                         f"{mean('median_transfer_ms'):.1f}",
                         f"{hidden:.1%} / {goal:.1%}", f"{handover:.2f} / {mean('p99_handover_ms'):.2f}", f"{itl:.2f}",
                         f"{handover / itl:.2f}", f"{mean('median_first_gap_ms') / itl:.2f}"])
    table(["prompt tokens", "transport", "prefill, ms", "extents", "first KV byte to last verified, ms",
           "of it behind prefill / goal", "token #1 to the running batch, p50 / p99 ms", "ITL, ms", "the batch, in ITLs",
           "gap #1 to #2, in ITLs"], rows)


def hidden_share(transfer, handover, **_):
    """How much of a transfer ran while the prompt was still being computed. What comes behind token #1 also contains
    joining the batch, so this is the least that was hidden."""
    return max(0.0, 1 - handover / transfer) if transfer else 1.0


def arrivals(args, setups):
    # The prefill node has all but the end of each prompt and the decode node has nothing of it: KV comes as fast as
    # the network and the decode node take it, whatever the prefill node can compute.
    chosen = over_each_transport(setups, decode_flags=("--no-enable-prefix-caching",))
    result = bench(args, "interference", "arrivals", chosen,
                   ["--prompt-len", ARRIVALS_TAIL, "--prompt-output-len", 2, "--stream-input-len", ARRIVALS_TAIL,
                    "--stream-output-len", args.stream_len, "--load", args.load],
                   ["--num-warmups", 2, "--random-prefix-len", args.prompt_len])
    rows = []
    for name, found in result["setups"].items():
        mean = lambda figure: sum(figure(r) for r in found["rounds"]) / len(found["rounds"])
        rate = result["load"] * mean(lambda r: r["prefill_capacity_per_s"])
        cells = [f"{mean(lambda r: r['itl_alone'][figure]):.2f} / {mean(lambda r: r['itl_beside_prompts'][figure]):.2f}"
                 for figure in ("p50_ms", "p99_ms", "max_ms")]
        rows.append([name, f"{rate * (args.prompt_len + ARRIVALS_TAIL) * token_bytes(args) / 1e6:.0f}", f"{rate:.1f}", *cells,
                     *(interval(found[f"{figure}_itl_factor"]) for figure in ("p50", "p99"))])
    table(["transport", "KV arriving, MB/s", "requests/s", "p50 ITL alone / beside, ms", "p99", "max", "p50 factor",
           "p99 factor"], rows)


def cost(args, setups):
    chosen = [setups.split(), setups.colocated("0"), setups.colocated("0,1"), *setups.peers()]
    bench(args, "compare", "cost", chosen, [],
          ["--num-prompts", args.requests, "--max-concurrency", 4, "--random-input-len", 512, "--random-output-len", 128,
           "--ignore-eos", "--num-warmups", 2])


def interval(ratio):
    if ratio is None:
        return "none"
    return f"{ratio['ratio']:.2f}" + (f" [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio["low"] else "")


def table(head, rows):
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    comparisons = {found.__name__: found for found in (interference, price, apart, goodput, handover, arrivals, cost)}
    parser.add_argument("comparison", choices=comparisons)
    parser.add_argument("--tandem", required=True, help="the release binary")
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for set-ups and results")
    parser.add_argument("--node-flags", default="", help="flags of every prefill and decode node, such as '--device sim' "
                        "to have a GPU's speeds and KV without one: --model is then any folder with a config.json")
    parser.add_argument("--device", help="of every prefill and decode node, such as cuda:0, which both may share")
    parser.add_argument("--step-tokens", type=int, default=512, help="handover, arrivals: tokens of a node's step, which "
                        "is what leaves a prefill node at a time")
    parser.add_argument("--transports", nargs="+", default=["quic", "quic,shm"], help="handover, arrivals: ways of KV, each "
                        "as --kv-transports takes it, such as: quic quic,cuda-ipc quic,nixl (the last of each is used; nixl "
                        "wants --node-flags '--nixl-library FILE')")
    parser.add_argument("--prefill-cores", default="0", help="cores of a split's prefill node, as taskset takes them")
    parser.add_argument("--decode-cores", default="1", help="cores of its decode node")
    parser.add_argument("--kv-bytes", default="1GiB", help="KV cache of every node")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=40, help="requests of a run, where a comparison has them")
    parser.add_argument("--rate", type=float, default=2, help="requests per second (apart, goodput)")
    parser.add_argument("--only", type=lambda text: text.split(","), help="set-ups to run, by their names; of price "
                        "the first two at least")
    parser.add_argument("--beside", default="0,1", help="cores of the load generator and of Tandem's proxies")
    parser.add_argument("--chunk", type=int, default=128, help="tokens of a colocated prompt chunk: tune it first")
    parser.add_argument("--prompt-len", type=int, default=1024, help="interference, arrivals: tokens of a long prompt")
    parser.add_argument("--load", type=float, default=0.5, help="arrivals: share of the prompts that could come one "
                        "after another")
    parser.add_argument("--stream-len", type=int, default=512, help="interference, arrivals: tokens of a stream")
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")],
                        default=[64, 256, 512, 1024, 2048, 4096, 8192], help="price, handover: prompt lengths")
    parser.add_argument("--trace", help="goodput: a trace in Mooncake's format")
    parser.add_argument("--llama-server", help="llama.cpp's server; needs --gguf")
    parser.add_argument("--gguf", help="the same weights for it")
    parser.add_argument("--vllm", help="the program of vLLM's CPU build")
    args = parser.parse_args()
    if args.llama_server and not args.gguf:
        sys.exit("--llama-server needs --gguf: tandem model gguf MODEL FILE --type bf16")
    args.tandem = str(pathlib.Path(args.tandem).resolve())
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    comparisons[args.comparison](args, Setups(args))


if __name__ == "__main__":
    main()

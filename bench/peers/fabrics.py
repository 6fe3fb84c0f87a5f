#!/usr/bin/env python3
"""KV between two processes, one core each: `tandem bench transfer` beside NIXL, Mooncake and s2n-quic, in turn.

    cargo build --release
    python -m venv venv && venv/bin/pip install numpy nixl-cu12==1.5.1 mooncake-transfer-engine-non-cuda==0.3.13.post1
    cargo build --release --locked --manifest-path bench/peers/s2n/Cargo.toml --target-dir target/s2n
    python bench/peers/fabrics.py --tandem target/release/tandem --python venv/bin/python \
        --s2n target/s2n/release/s2n-peer --rounds 5

Every round measures every row: first `tandem bench transfer` with one round of its own, then the others, each with
every size of extents. Figures are medians of the rounds, with the slowest and the fastest. The last columns say what
Tandem does with extents of the same size (of 1 MiB where they are larger) relative to a row, in GB/s and in bytes for each
CPU second: medians of the ratios of each round. Tandem makes and checks a digest of every extent, encrypts over quic, and sends from
a pool of blocks; NIXL and Mooncake do neither and move one piece of memory to another. NIXL is measured as it comes and
as it is fastest here: without its progress thread, over TCP with segments of 256 KiB. Its ends then look for work without
a pause, so they use their cores whether bytes come or not. s2n-quic encrypts and makes no digest; a row for each MTU
of --s2n-mtu, which ends at some 32 KiB. A row that is not installed is left out, and said.
"""
import argparse
import contextlib
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
# Row, fabric, and what UCX may use: over shared memory, TCP for finding each other.
SEGMENTS = {"UCX_TCP_TX_SEG_SIZE": "256K", "UCX_TCP_RX_SEG_SIZE": "256K"}
PYTHON_ROWS = [
    ("NIXL shm", "nixl", {"UCX_TLS": "sm,self,tcp"}),
    ("NIXL shm, polled", "nixl-polled", {"UCX_TLS": "sm,self,tcp"}),
    ("NIXL tcp", "nixl", {"UCX_TLS": "tcp,self"}),
    ("NIXL tcp, polled, 256K", "nixl-polled", {"UCX_TLS": "tcp,self"} | SEGMENTS),
    ("Mooncake tcp", "mooncake", {}),
]


class Ends:
    """The two processes of a row, which live through all rounds, and stand still while others are measured: some look for
    work without a pause, and would take the cores."""

    def __init__(self, owner, reader, env, cores):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        env = os.environ | env

        # A file, which does not fill up as a pipe would.
        self.log = tempfile.TemporaryFile("w+")

        def start(words, core):
            return subprocess.Popen(["taskset", "-c", core, *map(str, words)], env=env, stderr=self.log, **pipes)

        self.owner = start(owner, cores[1])
        self.reader = start(reader, cores[0])
        where = self.owner.stdout.readline().strip()
        self.is_up = bool(where) and self.ask(where) is not None

    def ask(self, line):
        """What the reader says to it; None if it has ended."""
        try:
            self.reader.stdin.write(line + "\n")
        except BrokenPipeError:
            return None
        return json.loads(self.reader.stdout.readline() or "null")

    def signal(self, which):
        for process in (self.reader, self.owner):
            process.send_signal(which)

    def end(self):
        self.signal(signal.SIGCONT)
        for process in (self.reader, self.owner):
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()

    def last_words(self):
        self.log.seek(0)
        return ([line.strip() for line in self.log if line.strip()] or ["it said nothing"])[-1]


class Figures:
    def __init__(self):
        self.rates, self.cpu = [], []

    def observe(self, num_bytes, seconds, *cpu_seconds):
        self.rates.append(num_bytes / seconds / 1e9)
        self.cpu.append([value / num_bytes * 1e9 for value in cpu_seconds])

    def line(self, ours):
        sent, received = (statistics.median(column) for column in zip(*self.cpu))
        spread = f"{min(self.rates):.2f} to {max(self.rates):.2f}"
        return (f"{statistics.median(self.rates):>7.2f} {spread:>15} {sent + received:>9.2f} {f'{sent:.2f} / {received:.2f}':>13}"
                + "".join(f"{self.beaten_by(row):>14}" for row in ours))

    def beaten_by(self, other):
        """What another row's rate and bytes per CPU second are, relative to this one's."""
        if not other:
            return ""
        rates = statistics.median(theirs / mine for mine, theirs in zip(self.rates, other.rates))
        per_cpu = statistics.median(sum(mine) / max(sum(theirs), 1e-9) for mine, theirs in zip(self.cpu, other.cpu))
        return f"{rates:.2f} / {per_cpu:.2f}"


def stolen_ticks():
    """Hundredths of a second that the host gave to others, of all: idle ones included."""
    fields = [int(field) for field in open("/proc/stat").readline().split()[1:]]
    return fields[7], sum(fields[:8])


def tandem_round(args, figures):
    """Rows of the table that `tandem bench transfer` prints."""
    command = [args.tandem, "bench", "transfer", "--rounds", "1", "--num-single", "1", "--request-mib", args.mib,
               "--extent-tokens", ",".join(str(kib) for kib in sorted({min(kib, 1024) for kib in args.extent_kib})),
               "--cores", ",".join(args.cores)]
    output = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout
    for line in output.splitlines():
        name, fields = line[:20].strip(), line[20:].split()
        # GB/s, of TCP, of TLS, of copy, CPU s/GB, sender, slash, receiver.
        if name and len(fields) >= 8 and fields[6] == "/":
            row = figures.setdefault(name, Figures())
            row.rates.append(float(fields[0]))
            row.cpu.append([float(fields[5]), float(fields[7])])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tandem", help="the release binary")
    parser.add_argument("--python", help="an interpreter that has NIXL and Mooncake")
    parser.add_argument("--s2n", help="the binary of bench/peers/s2n")
    parser.add_argument("--s2n-mtu", type=lambda text: text.split(","), default=["1500", "9000", "32780"],
                        help="IP and UDP headers included")
    parser.add_argument("--extent-kib", type=lambda text: [int(n) for n in text.split(",")], default=[64, 1024, 4096],
                        help="Tandem's own extents end at 1024 KiB")
    parser.add_argument("--mib", type=int, default=64, help="of one transfer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=lambda text: text.split(","), default=["0", "1"], help="of reader and owner")
    args = parser.parse_args()

    rows = []
    if args.python:
        end = [args.python, HERE / "fabric_end.py"]
        rows += [(name, [*end, fabric, "owner", args.mib], [*end, fabric, "reader", args.mib], env)
                 for name, fabric, env in PYTHON_ROWS]
    if args.s2n:
        rows += [(f"s2n-quic {mtu}", [args.s2n, "owner", args.mib, mtu], [args.s2n, "reader", args.mib, mtu], {})
                 for mtu in args.s2n_mtu]
    ends = {}
    for name, owner, reader, env in rows:
        started = Ends(owner, reader, env, args.cores)
        # The first touches every page and makes the connections.
        if started.is_up and all(started.ask(str(kib << 10)) for kib in args.extent_kib):
            ends[name] = started
            started.signal(signal.SIGSTOP)
        else:
            started.end()
            print(f"LEFT OUT: {name}: {started.last_words()}", file=sys.stderr)

    figures, before = {}, stolen_ticks()
    for number in range(args.rounds):
        print(f"\rround {number + 1} of {args.rounds}", end="", file=sys.stderr)
        if args.tandem:
            tandem_round(args, figures)
        for name, pair in ends.items():
            pair.signal(signal.SIGCONT)
            for kib in args.extent_kib:
                said = pair.ask(str(kib << 10))
                assert said, f"{name} ended"
                row = figures.setdefault(f"{name}, {kib} KiB", Figures())
                row.observe(args.mib << 20, said["seconds"], said["owner_cpu_seconds"], said["reader_cpu_seconds"])
            pair.signal(signal.SIGSTOP)
    print(file=sys.stderr)
    for pair in ends.values():
        pair.end()
    stolen, total = (now - then for now, then in zip(stolen_ticks(), before))
    print(f"two processes, one core each; GB = 10^9 bytes; {args.mib} MiB at a time, medians of {args.rounds} rounds; "
          f"{stolen / max(total, 1):.1%} of the time was the host's")
    print(f"{'':<30} {'GB/s':>7} {'least to most':>15} {'CPU s/GB':>9} {'send / recv':>13} {'quic over it':>14} {'shm over it':>13}")
    for name, row in figures.items():
        *_, size = name.split(", ")
        kib = int(size.removesuffix(" KiB")) if size.endswith(" KiB") else max(args.extent_kib)
        ours = [figures.get(f"{transport}, {min(kib, 1024)} KiB") for transport in ("quic", "shm")]
        print(f"{name:<30} {row.line(ours)}")


if __name__ == "__main__":
    main()

"""One end of a transfer over somebody else's fabric, which `fabrics.py` starts.

    fabric_end.py nixl owner MIB      holds the bytes, says in one line where, and lives until standard input ends
    fabric_end.py nixl reader MIB     is told that line, then for each line EXTENT_BYTES reads all of them in extents of
                                      that size and says how long it took: seconds, CPU seconds of owner and of reader

`nixl` is nixl-cu12 from PyPI, over whatever UCX_TLS names; `nixl-polled` the same without its progress thread: both ends
look for work themselves without a pause. `mooncake` is mooncake-transfer-engine-non-cuda, over TCP.
The reader asks for all extents at once, as these fabrics are used; NIXL's lists of descriptors are prepared before the
clock starts. Neither makes a digest; the reader compares the bytes behind each transfer, outside of what is measured, so
that a transfer that did not happen is noticed.
"""
import base64
import json
import os
import pathlib
import select
import sys
import time

import numpy


class Nixl:
    has_thread = True

    def __init__(self, name, memory):
        from nixl_cu12._api import nixl_agent, nixl_agent_config

        self.agent = nixl_agent(name, nixl_agent_config(enable_prog_thread=self.has_thread, backends=["UCX"]))
        self.memory, self.prepared = memory, {}
        self.registered = self.agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], mem_type="DRAM")

    def where(self):
        return {"metadata": base64.b64encode(self.agent.get_agent_metadata()).decode()}

    def connect(self, where):
        self.remote = self.agent.add_remote_agent(base64.b64decode(where["metadata"]))
        if isinstance(self.remote, bytes):
            self.remote = self.remote.decode()

    def prepare(self, remote_address, extent_bytes):
        def extents(who, start):
            found = [(start + at, extent_bytes, 0) for at in range(0, self.memory.nbytes, extent_bytes)]
            return self.agent.prep_xfer_dlist(who, self.agent.get_xfer_descs(found, mem_type="DRAM"), mem_type="DRAM")

        if extent_bytes not in self.prepared:
            sides = extents("", self.memory.ctypes.data), extents(self.remote, remote_address)
            self.prepared[extent_bytes] = *sides, list(range(self.memory.nbytes // extent_bytes))

    def read(self, _remote_address, extent_bytes):
        near, far, indices = self.prepared[extent_bytes]
        handle = self.agent.make_prepped_xfer("READ", near, indices, far, indices, skip_desc_merge=True)
        state = self.agent.transfer(handle)
        while state not in ("DONE", "ERR"):
            state = self.agent.check_xfer_state(handle)
        self.agent.release_xfer_handle(handle)
        return state == "DONE"

    def poll(self):
        self.agent.get_new_notifs()


class NixlPolled(Nixl):
    has_thread = False


class Mooncake:
    def __init__(self, _name, memory):
        from mooncake.engine import TransferEngine

        self.engine, self.memory = TransferEngine(), memory
        assert self.engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0, "Mooncake does not start"
        assert self.engine.register_memory(memory.ctypes.data, memory.nbytes) == 0, "Mooncake does not take the memory"

    def where(self):
        return {"session": f"127.0.0.1:{self.engine.get_rpc_port()}"}

    has_thread = True

    def connect(self, where):
        self.session = where["session"]

    def prepare(self, _remote_address, _extent_bytes):
        """It has nothing to prepare."""

    def read(self, remote_address, extent_bytes):
        offsets = range(0, self.memory.nbytes, extent_bytes)
        near, far = ([start + at for at in offsets] for start in (self.memory.ctypes.data, remote_address))
        return self.engine.batch_transfer_sync_read(self.session, near, far, [extent_bytes] * len(offsets)) == 0


FABRICS = {"nixl": Nixl, "nixl-polled": NixlPolled, "mooncake": Mooncake}


def cpu_seconds(pid):
    """Of all threads, in nanoseconds' resolution where /proc/PID/stat has hundredths of a second."""
    tasks = pathlib.Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def noise(num_bytes):
    return numpy.random.default_rng(1).integers(0, 256, num_bytes, dtype=numpy.uint8)


def say(**fields):
    # What the fabric prints goes elsewhere.
    os.write(ANSWERS, (json.dumps(fields) + "\n").encode())


def owner(fabric, num_bytes):
    memory = noise(num_bytes)
    end = fabric("owner", memory)
    say(address=memory.ctypes.data, pid=os.getpid(), **end.where())
    while not fabric.has_thread and not select.select([sys.stdin], [], [], 0)[0]:
        for _ in range(1000):
            end.poll()
    sys.stdin.read()
    del end


def reader(fabric, num_bytes):
    memory, expected = numpy.zeros(num_bytes, dtype=numpy.uint8), noise(num_bytes)
    end = fabric("reader", memory)
    where = json.loads(sys.stdin.readline())
    end.connect(where)
    say(is_ready=True)
    for line in sys.stdin:
        extent_bytes = int(line)
        memory[:] = 0
        end.prepare(where["address"], extent_bytes)
        cpu, started = (cpu_seconds(where["pid"]), cpu_seconds(os.getpid())), time.perf_counter()
        assert end.read(where["address"], extent_bytes), "the transfer failed"
        took = time.perf_counter() - started
        cpu = [now - before for now, before in zip((cpu_seconds(where["pid"]), cpu_seconds(os.getpid())), cpu)]
        assert numpy.array_equal(memory, expected), "other bytes arrived than were sent"
        say(seconds=took, owner_cpu_seconds=cpu[0], reader_cpu_seconds=cpu[1])


if __name__ == "__main__":
    ANSWERS = os.dup(1)
    os.dup2(2, 1)
    {"owner": owner, "reader": reader}[sys.argv[2]](FABRICS[sys.argv[1]], int(sys.argv[3]) << 20)

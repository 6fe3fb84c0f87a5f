"""A set-up of Tandem's processes for the scripts beside this file: started, waited for, asked, ended."""
import json
import pathlib
import socket
import subprocess
import sys
import time
import urllib.request

READY_SECONDS = 120


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """Processes that serve one model on `port`; what they log goes to the file `log`."""

    def __init__(self, port, log, commands):
        self.url, log = f"http://127.0.0.1:{port}", pathlib.Path(log)
        with log.open("a") as out:
            self.processes = [subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, stderr=out)
                              for command in commands]
        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                self.model = json.loads(self.get("/v1/models"))["data"][0]["id"]
                return
            except OSError:
                if any(process.poll() is not None for process in self.processes) or time.monotonic() > deadline:
                    self.stop()
                    sys.exit(f"{commands} did not come up:\n{log.read_text()}")
                time.sleep(0.1)

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return answer.read().decode()

    def stop(self):
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait()

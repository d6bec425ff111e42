"""Tests in several processes, one a rank: started together, ended together, each leaving its results in a file."""

import json
import subprocess
import time
from contextlib import ExitStack


def run_ranks(folder, commands, environments, timeout):
    """Results of each rank by check, from the file `<rank>.json` in `folder`, and the end of what it printed as errors.
    A check that hangs leaves no result; its process is ended after `timeout` seconds."""
    with ExitStack() as stack:
        ranks = []
        for rank, (command, env) in enumerate(zip(commands, environments, strict=True)):
            err = stack.enter_context((folder / f"{rank}.err").open("w"))
            ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=err))
        until = time.monotonic() + timeout
        try:
            for process in ranks:
                process.wait(max(until - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            pass  # told by the results that are missing
        finally:
            for process in ranks:
                process.kill()
                process.wait()
    files = [folder / f"{rank}.json" for rank in range(len(ranks))]
    errors = [(folder / f"{rank}.err").read_text()[-2000:] for rank in range(len(ranks))]
    return [json.loads(f.read_text()) if f.exists() else {} for f in files], errors

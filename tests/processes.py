"""Tests in several processes, one a rank: forks of one that has imported what they need, ended together."""

import json
import os
import signal
import subprocess
import sys


def run_ranks(folder, world, module, *args, env, timeout):
    """Results of each rank by check, from the file `<rank>.json` in `folder`, and the end of what it printed as errors.

    `python -m module folder world *args` is to call `fork_ranks`. A check that hangs leaves no result; its process is
    ended after `timeout` seconds."""
    command = [sys.executable, "-W", "error", "-m", module, str(folder), str(world), *args]
    with (folder / "all.err").open("w") as err:
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=err, start_new_session=True)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            pass  # told by the results that are missing
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    files = [folder / f"{rank}.json" for rank in range(world)]
    errors = [folder / f"{rank}.err" for rank in range(world)]
    errors = [(e if e.exists() else folder / "all.err").read_text()[-2000:] for e in errors]
    return [json.loads(f.read_text()) if f.exists() else {} for f in files], errors


def fork_ranks(folder, world, call):
    """`call(rank)` in a fork of this process for each rank, with torchrun's variables; what it prints as errors goes to
    `<rank>.err` in `folder`."""
    ranks = []
    for rank in range(world):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
            with open(folder / f"{rank}.err", "w") as err:
                os.dup2(err.fileno(), 2)
            try:
                call(rank)
            finally:
                sys.stderr.flush()
                os._exit(0)
    for pid in ranks:
        os.waitpid(pid, 0)

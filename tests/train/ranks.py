"""Several processes on one machine, for tests of what they do together."""

import multiprocessing
import tempfile
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# forks of one process that has imported torch start at once, and it never ran a thread
multiprocessing.set_forkserver_preload(["torch.distributed.fsdp", "open_mythos.train.trainer"])


def run_ranks(processes, function, *args, seconds=600):
    """Call ``function(ranks, *args)`` in several processes; return what each of them returned."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _run,
            (processes, folder, function, args),
            processes,
            join=False,
            start_method="forkserver",
        )
        deadline = time.monotonic() + seconds
        try:
            while not context.join(timeout=1):
                assert time.monotonic() < deadline, f"not done in {seconds} s"
        finally:
            for process in context.processes:
                process.kill()
        return [
            torch.load(Path(folder) / f"result{rank}.pt", weights_only=False)
            for rank in range(processes)
        ]


class Ranks:
    """This process among those of :func:`run_ranks`."""

    def __init__(self, rank, processes, folder):
        self.rank, self.processes, self.folder, self._groups = rank, processes, folder, 0

    @contextmanager
    def group(self, size, timeout=60):
        """A process group of the first ``size``; True inside it, False in the other processes."""
        self._groups += 1
        if self.rank >= size:
            yield False
            return
        store = dist.FileStore(str(Path(self.folder) / f"store{self._groups}"), size)
        dist.init_process_group(
            "gloo", store=store, rank=self.rank, world_size=size, timeout=timedelta(seconds=timeout)
        )
        try:
            yield True
        finally:
            dist.destroy_process_group()


def _run(rank, processes, folder, function, args):
    torch.set_num_threads(1)
    result = function(Ranks(rank, processes, folder), *args)
    torch.save(result, Path(folder) / f"result{rank}.pt")

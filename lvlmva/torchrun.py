"""Stages that train, in the several processes that `compute.processes` of params.yaml asks for: torchrun starts them.

The stage starts its own command anew, once a process, and waits. Where torchrun was called by hand (as several machines
need), what it started is taken as it is. The first process writes the outputs.
"""

import ctypes
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lvlmva.params import Compute, load_params
from lvlmva_core.errors import InputError

STARTED = "TORCHELASTIC_RUN_ID"  # environment variable: this is a process that torchrun started
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where such a process says how it failed
PR_SET_PDEATHSIG = 1  # as linux/prctl.h has it


def in_processes(stage: Callable[..., Any], module: str, options: dict[str, Any]) -> None:
    """Run a stage with `options` in as many processes as params ask for; in all of them it returns, or fails.

    Args:
        module: what `python -m` runs, e.g. "stages.train".

    Raises:
        InputError: as the stage, or a process was killed, or there are not as many devices as processes.
    """
    compute = load_params(options["params"]).compute
    if STARTED in os.environ:
        _be_one(compute, stage, options)
    elif compute.processes == 1:
        stage(**options)
    else:
        check_processes(compute)
        _start(compute, module, options)


def check_processes(compute: Compute, here: int | None = None) -> None:
    """Raises InputError where `here` processes on this machine (None = all of them) have no device of their own."""
    import torch

    if compute.processes == 1 or compute.device == "cpu":
        return
    if compute.device != "cuda":
        raise InputError(
            f"compute.device: '{compute.device}' is one device, and compute.processes is {compute.processes}; set it "
            "to cuda, and each takes its own"
        )
    here, there = compute.processes if here is None else here, torch.cuda.device_count()
    if here > there:
        raise InputError(f"compute.processes: {here} on this machine, which has {there} CUDA devices; lower it")


def _start(compute: Compute, module: str, options: dict[str, Any]) -> None:
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    how = ["--standalone", "--nproc-per-node", str(compute.processes), "--module", module, *words]
    os.environ["OMP_NUM_THREADS"] = str(compute.threads)  # torchrun warns where nobody says
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it says is said below
    try:
        run(parse_args(how))
    except SignalException as end:
        raise SystemExit(128 + end.sigval) from None
    except ChildFailedError as error:
        failures = error.failures
        # one that was killed comes first: the others miss it, and fail too
        first = min(failures, key=lambda rank: (failures[rank].exitcode >= 0, failures[rank].timestamp))
        if Path(failures[first].error_file).is_file():
            raise InputError(failures[first].message) from None
        code = failures[first].exitcode
        ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else "failed, as it says above"
        raise InputError(
            f"process {first} of {compute.processes} {ended}, and the others were stopped; repeat the command, and the "
            "training goes on from its last checkpoint"
        ) from None


def _be_one(compute: Compute, stage: Callable[..., Any], options: dict[str, Any]) -> None:
    """Run the stage as one of several processes."""
    import torch
    from torch import distributed

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nothing trains on when torchrun is gone
    size, here = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    try:
        if size != compute.processes:
            raise InputError(
                f"compute.processes is {compute.processes}, but torchrun started {size}; set it to {size}: the last "
                "bits of results depend on it"
            )
        check_processes(compute, here)
        if compute.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if compute.device == "cuda" else "gloo")
        stage(**options)
    except InputError as error:  # all have the same to say, and the one who started them says it
        reply = {"message": re.sub(r"\s+", " ", str(error)), "timestamp": int(time.time())}
        Path(os.environ[ERROR_FILE]).write_text(json.dumps(reply), encoding="utf-8")
        raise SystemExit(1) from None
    distributed.barrier()  # the others wait until the first has written
    distributed.destroy_process_group()

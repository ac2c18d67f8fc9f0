"""How ranks come to be: joined (torchrun, SLURM), alone, or forked by us.

``init_distributed`` joins the run from within a rank. ``spawn`` forks the ranks of ``megagen train
--nproc N``; ``run_ranks`` forks them for a test and brings their results back.
"""

from __future__ import annotations

import datetime
import os
import socket
import subprocess
from collections.abc import Mapping

import torch
import torch.distributed as dist

from megagen.core import process
from megagen.core.errors import SetupError
from megagen.parallel import cpu_platform, fused_adam
from megagen.parallel.ranks import RankError, run_ranks, spawn

__all__ = ["RankError", "init_distributed", "run_ranks", "shutdown", "spawn"]


def init_distributed(
    *,
    init_method: str | None = None,
    timeout: datetime.timedelta = datetime.timedelta(minutes=30),
) -> None:
    """Join the run's process group (nccl with CUDA, else gloo) and make megatron-core ready for it.

    Ranks come from torchrun's variables, else from SLURM's (``srun``), else this process is alone.
    Called again it does nothing.

    Args:
        init_method: where the ranks meet; None: ``env://``, or nowhere for a process alone.
        timeout: how long a collective waits for its peers.

    Raises:
        SetupError: the variables are incomplete.
    """
    if not dist.is_initialized():
        environment = rank_environment(os.environ)
        os.environ.update(environment)
        has_cuda = torch.cuda.is_available()
        if has_cuda:
            # Megatron's overlaps rely on kernels starting in the order they were launched in
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
            torch.cuda.set_device(process.device())
        alone = environment["WORLD_SIZE"] == "1" and "MASTER_ADDR" not in os.environ
        store = dist.HashStore() if init_method is None and alone else None
        dist.init_process_group(
            "nccl" if has_cuda else "gloo",
            init_method=None if store is not None else init_method or "env://",
            store=store,
            rank=int(environment["RANK"]),
            world_size=int(environment["WORLD_SIZE"]),
            timeout=timeout,
        )
    cpu_platform.enable()
    fused_adam.install()


def shutdown() -> None:
    """Leave the process group once every rank has come to its end."""
    if dist.is_initialized():
        # a rank that leaves early breaks gloo peers that are still connecting to it
        dist.barrier()
        dist.destroy_process_group()


def rank_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for this process, from its own environment.

    Args:
        environ: what ``os.environ`` holds.

    Returns:
        RANK, WORLD_SIZE, LOCAL_RANK, and under SLURM also MASTER_ADDR and MASTER_PORT.

    Raises:
        SetupError: the variables are incomplete.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        try:
            found = {name: environ[name] for name in ("RANK", "WORLD_SIZE")}
        except KeyError as error:
            raise SetupError(
                f"the environment has one of RANK and WORLD_SIZE; {error.args[0]} is missing.",
                remedy="Start with torchrun, srun or --nproc, or set neither.",
            ) from None
        return {**found, "LOCAL_RANK": environ.get("LOCAL_RANK", found["RANK"])}
    num_tasks = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1"))
    if "SLURM_PROCID" not in environ or num_tasks == "1":
        return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": num_tasks,
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or _first_slurm_host(environ),
        # jobs that share a node get different ports
        "MASTER_PORT": environ.get("MASTER_PORT")
        or str(20000 + int(environ.get("SLURM_JOB_ID", "0")) % 20000),
    }


def _first_slurm_host(environ: Mapping[str, str]) -> str:
    nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", ""))
    if "[" not in nodes:
        name = nodes.split(",")[0]
    else:
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
        name = listed.stdout.split()[0]
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        raise SetupError(
            f"the first SLURM host {name!r} (of {nodes!r}) has no address: {error}.",
            remedy="Set MASTER_ADDR to an address of the first node that all nodes reach.",
        ) from None
    return name

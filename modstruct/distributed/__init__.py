"""Processes, collectives with gradients, hosts, heartbeat, work shared out over the processes."""

from modstruct.distributed.collectives import (
    HostCopy,
    RowExchange,
    all_sum,
    gather,
    max_over_processes,
    require_equal_rows,
    sum_over_processes,
)
from modstruct.distributed.processes import (
    barrier,
    broadcast_object,
    device,
    fail_together,
    gather_objects,
    is_distributed,
    is_main,
    local_rank,
    main_first,
    on_gpu,
    own_store,
    rank,
    start_processes,
    world_size,
)
from modstruct.errors import FailedElsewhere

__all__ = [
    "FailedElsewhere",
    "HostCopy",
    "RowExchange",
    "all_sum",
    "barrier",
    "broadcast_object",
    "device",
    "fail_together",
    "gather",
    "gather_objects",
    "is_distributed",
    "is_main",
    "local_rank",
    "main_first",
    "max_over_processes",
    "on_gpu",
    "own_store",
    "rank",
    "require_equal_rows",
    "start_processes",
    "sum_over_processes",
    "world_size",
]

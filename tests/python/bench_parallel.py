"""One rank of the peers that `cargo xtask bench parallel` measures beside Tangelo; rank 0 prints one JSON line.

  bench_parallel.py CONFIG.json DTYPE WRAPPER STEPS SEQ BATCH   seconds of every training step of a random model

WRAPPER is none (one rank), ddp or fsdp2. RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set as torchrun does. One
thread; a rank's batch is its own.

bf16 under fsdp2 is as ours: fp32 masters, weights gathered and computed with in bf16, gradients summed in fp32. Under
ddp or none, which have no such policy, it is a model whose parameters are bf16 throughout: half the bytes of our
gradients and no master weights, so less work than Tangelo does.
"""

import json
import os
import sys
import time

import torch
import torch.distributed as dist
from bench import build, step


def wrap(model, wrapper, dtype):
    if wrapper == "fsdp2":
        return shard(model, dtype)
    if dtype == "bf16":
        model = model.to(torch.bfloat16)
    if wrapper == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model


def shard(model, dtype):
    """A group of parameters for each layer, and one for the rest, over a mesh of CPUs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    compute = torch.bfloat16 if dtype == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def train(config_path, dtype, wrapper, steps, seq, batch):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = wrap(build(config_path), wrapper, dtype)
    vocab_size = json.load(open(os.path.join(config_path, "config.json")))["vocab_size"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    torch.manual_seed(1 + rank)
    seconds = []
    for _ in range(steps):
        ids = torch.randint(vocab_size, (batch, seq))
        start = time.perf_counter()
        step(model, optimizer, ids)
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        print(json.dumps(dict(step_seconds=seconds)))
    dist.destroy_process_group()


def main():
    match sys.argv[1:]:
        case [config, dtype, wrapper, steps, seq, batch]:
            train(config, dtype, wrapper, int(steps), int(seq), int(batch))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()

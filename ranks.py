"""Several processes that train one model: torchrun --nproc-per-node N caopd.py ...

torchrun starts N processes, the ranks 0 to N - 1, each with a device of its own. Every rank runs
the whole of caopd.py on its share of the prompts. Weights, gradients and moments are spread over
them (torch's FSDP2): a rank keeps a part of each tensor, a layer is gathered while it computes, and
its gradients are summed over the ranks. All else is known to all: every rank takes the same
decisions and makes the same number of passes, since one that waits for a pass of the others waits
for ever. Rank 0 alone writes and speaks.

Where one process runs alone, each function here gives back what it gets.
"""

import copy
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn


def size() -> int:
    """How many processes run this command: one, or as many as torchrun has started."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank() -> int:
    """Which of them this one is."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def first() -> bool:
    """Whether this is rank 0, the one that writes and speaks."""
    return rank() == 0


def own_gpu() -> int:
    """Which GPU of its machine is this rank's."""
    return int(os.environ["LOCAL_RANK"]) if size() > 1 else 0


# ------------------------------------------------------------------------- beginning and ending


@contextmanager
def connected() -> Iterator[None]:
    """Within the block the ranks can reach each other: over NCCL for GPUs, over gloo for the rest.
    """
    if size() == 1:
        yield
        return
    backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # A rank that ends is noticed by its closed connection. One that is slow has a day.
    dist.init_process_group(backends, timeout=timedelta(days=1))
    yield
    dist.destroy_process_group()  # not after an error: the others may never come here


def lost_another(error: RuntimeError) -> bool:
    """Whether an error says that another rank can no longer be reached."""
    return size() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


def first_to_end() -> bool:
    """Whether no other rank has asked this: whoever ends first tells why, the others follow it."""
    if size() == 1:
        return True
    try:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                              is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"ended {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    except dist.DistError:
        return True


# ------------------------------------------------------------------- who does what, who knows what


def shares(items: list) -> list[list]:
    """The share of the items that each rank has: one of every N."""
    return [items[i::size()] for i in range(size())]


def share(items: list) -> list:
    """This rank's share of the items."""
    return shares(items)[rank()] if size() > 1 else items


def gather(own: list) -> list:
    """What all ranks have made of their shares, on each of them, in the order of the items."""
    if size() == 1:
        return own
    parts = [None] * size()
    dist.all_gather_object(parts, own)
    return [parts[i % size()][i // size()] for i in range(sum(map(len, parts)))]


def from_first(value):
    """Rank 0's value, on every rank; the others wait here until rank 0 has come."""
    if size() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held)
    return held[0]


def total(numbers: np.ndarray) -> np.ndarray:
    """The numbers, summed over the ranks."""
    if size() > 1:
        dist.all_reduce(torch.from_numpy(numbers))
    return numbers


def total_norm(norm: Tensor) -> Tensor:
    """The norm of a vector of which each rank has a part, from the norm of that part."""
    if size() == 1:
        return norm
    square = norm.square()
    dist.all_reduce(square)
    return square.sqrt()


# --------------------------------------------------------------------------- a model in parts


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """Spreads a model's weights over the ranks, on `device`, each layer a group of its own.

    Layers are gathered in the dtype that they compute in. Embedding, norm and head are the root's
    group, which is gathered as it is stored: `Transformer.logits` casts the head itself, for each
    chunk of logits, so that the gradients of all chunks add up in float32. That group stays from
    `hidden` to the end of the backward pass, because the number of chunks differs from rank to
    rank, and none of them may wait for the others.
    """
    if size() == 1:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (MixedPrecisionPolicy, fully_shard,
                                        register_fsdp_forward_method)
    free_unused()
    mesh = init_device_mesh(device.type, (size(),))
    computed = MixedPrecisionPolicy(param_dtype=model.compute_dtype, reduce_dtype=torch.float32)
    stored = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=computed)
    fully_shard(model, mesh=mesh, mp_policy=stored, reshard_after_forward=False)
    for group in (*model.model.layers, model):
        group.set_gradient_divide_factor(1.0)  # Gradients are summed, as over micro-batches.
        # Otherwise a factor goes along with each sum, in an operation that gloo lacks.
        group.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "hidden")  # Otherwise `forward` alone gathers weights.
    return model


def is_sharded(model: nn.Module) -> bool:
    return hasattr(model, "reshard")


def deepcopy(model: nn.Module, memo: dict) -> nn.Module:
    """copy.deepcopy, also of a sharded model, whose copy has nothing of `memo` in it."""
    if not is_sharded(model):
        return copy.deepcopy(model, memo)
    twin = shard(model.outline(), model.device).to_empty(device=model.device)
    with torch.no_grad():
        for weight, origin in zip(twin.parameters(), model.parameters()):
            local(weight).copy_(local(origin))
    return twin


def forget_gathered(model: nn.Module) -> None:
    """Lets the root's group go, which a pass without a backward pass leaves gathered.

    What is gathered are the weights as they were: to be called before they change.
    """
    if is_sharded(model):
        model.reshard()


def free_unused() -> None:
    """Frees the memory of sharded models that nothing uses any longer.

    They refer to themselves, so that they stay until Python looks for such circles.
    """
    if size() > 1:
        gc.collect()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, which shares its memory; it may be empty."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor whose parts the ranks have; each of them has to ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def collected(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors by name, on rank 0, whose main memory they come to one by one."""
    if size() == 1:
        return tensors
    kept = {}
    for name, tensor in tensors.items():
        tensor = whole(tensor)
        if first():
            kept[name] = tensor.cpu()
    return kept


def parted_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor that every rank has, in parts as `other` is."""
    if not hasattr(other, "to_local"):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)

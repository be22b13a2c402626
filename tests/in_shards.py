"""Run by torchrun: an adapted model under FSDP2 is trained, saved, and refused where it cannot be adapted."""

import sys
import warnings
from pathlib import Path

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lorakit
import models

IDS = torch.arange(24).view(4, 6)


def trained(model: torch.nn.Module, rows: torch.Tensor) -> torch.nn.Module:
    optimizer = torch.optim.SGD(lorakit.parameters(model), lr=0.5)
    for _ in range(3):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def adapted(begun: Path) -> torch.nn.Module:
    model = models.llama().train()
    lorakit.load(model, begun)
    return model


def shard(model: torch.nn.Module) -> torch.nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def refused(wanted: str, call) -> None:
    try:
        call()
    except lorakit.LoraError as error:
        assert wanted in str(error), error
    else:
        raise AssertionError(f"not refused: {wanted}")


def main(folder: Path) -> None:
    warnings.simplefilter("error")
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    model = shard(adapted(folder / "begun"))
    trained(model, IDS.chunk(size)[rank])
    lorakit.save(model, folder / "sharded")
    refused("its weight is sharded", lambda: lorakit.merge(model))
    refused("its weight is sharded", lambda: lorakit.load(model, folder / "begun"))
    refused("Call attach or load first, and shard the model after", lambda: lorakit.attach(shard(models.llama())))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

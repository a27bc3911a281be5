"""``World`` with one process, whose collectives are the identity, and ``use_world``."""

from __future__ import annotations

import torch

from duoka.world import World, current_world, has_current_world, use_world


def test_with_one_process_every_collective_returns_its_input() -> None:
    world = current_world()
    tensor, value = torch.arange(3.0), {"a": object()}
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert world.all_reduce(tensor) is tensor
    assert world.broadcast_object(value) is value
    assert world.all_gather_object(value) == [value]
    assert [world.any_rank(True), world.any_rank(False)] == [True, False]
    world.barrier()


def test_use_world_holds_inside_its_block_only() -> None:
    world = World(2, 5, torch.device("cpu"))
    with use_world(world):
        assert current_world() is world
        assert has_current_world()
    assert not has_current_world()
    assert current_world().size == 1

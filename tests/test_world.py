"""A world of one is a world: its collectives are the identity."""

from __future__ import annotations

import torch

from duoka.world import World, current_world, entered, is_entered


def test_alone_every_collective_returns_its_input() -> None:
    world = current_world()
    tensor, value = torch.arange(3.0), {"a": object()}
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert world.all_reduce(tensor) is tensor
    assert world.broadcast_object(value) is value
    assert world.all_gather_object(value) == [value]
    assert [world.any_rank(True), world.any_rank(False)] == [True, False]
    world.barrier()


def test_a_place_is_left_as_it_was_entered() -> None:
    place = World(2, 5, torch.device("cpu"))
    with entered(place):
        assert current_world() is place
        assert is_entered()
    assert not is_entered()
    assert current_world().size == 1

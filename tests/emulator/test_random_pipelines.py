"""Rings of stages between warps, drawn at random: right in every order, and found out where synchronisation is missing.

`pipelines` says of each synchronisation whether the program needs it. Without one that it needs there is a finding,
whatever the order; without another the results are the same as before. The same holds for wrong counts and places.
"""

from __future__ import annotations

import pytest

from cute_attn.emulator.errors import EmulatorError, EmulatorFault

from .pipelines import FILLS, Pipeline

FIRST = {fill: next(n for n in range(1000) if Pipeline.draw(n).fill == fill) for fill in FILLS}
ORDERS = (None, 1, 2)
MANY = range(100, 160)


def check_orders(pipeline: Pipeline, orders: tuple[int | None, ...]) -> None:
    expected = pipeline.expected()
    for seed in orders:
        assert (pipeline.run(seed=seed) == expected).all(), seed
    assert (pipeline.run(races=False) == expected).all()


def check_parts(pipeline: Pipeline, orders: tuple[int | None, ...]) -> None:
    expected = pipeline.expected()
    for part in [*pipeline.parts(), *pipeline.faults()]:
        for seed in orders:
            if not pipeline.needed(part):
                assert (pipeline.run(without=part, seed=seed) == expected).all(), (part, seed)
                continue
            with pytest.raises(EmulatorError) as caught:
                pipeline.run(without=part, seed=seed)
                pytest.fail(f"nothing found without {part}, order {seed}")
            assert not isinstance(caught.value, EmulatorFault), (part, seed)


@pytest.mark.parametrize("fill", FILLS)
def test_right_in_every_order(fill: str) -> None:
    check_orders(Pipeline.draw(FIRST[fill]), ORDERS)


@pytest.mark.parametrize("fill", FILLS)
def test_every_synchronisation_is_found_missing_or_is_not_needed(fill: str) -> None:
    check_parts(Pipeline.draw(FIRST[fill]), (None,))


@pytest.mark.slow
@pytest.mark.parametrize("number", MANY)
def test_many(number: int) -> None:
    pipeline = Pipeline.draw(number)
    check_orders(pipeline, (None, *range(10)))
    check_parts(pipeline, ORDERS)

"""Settings: a period, nested periods, and what is refused where it is asked for."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from cute_attn import emulator
from cute_attn.emulator.settings import Settings, current_settings


def test_periods_nest_and_end_with_exceptions() -> None:
    with emulator.settings(seed=np.int64(3)):
        with pytest.raises(ZeroDivisionError), emulator.settings(races=False):
            assert current_settings() == Settings(seed=3, races=False)
            raise ZeroDivisionError
        assert current_settings() == Settings(seed=3)
    assert current_settings() == Settings()


def test_a_period_is_of_one_thread() -> None:
    seen: list[Settings] = []
    with emulator.settings(seed=1):
        thread = threading.Thread(target=lambda: seen.append(current_settings()))
        thread.start()
        thread.join()
    assert seen == [Settings()]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"seed": -1}, "seed=-1: a number from 0 on"),
        ({"seed": "x"}, "seed='x'"),
        ({"multiprocessors": 0}, "multiprocessors=0: a positive number"),
        ({"uninitialized_shared": "ignore"}, "uninitialized_shared='ignore': one of 'error', 'poison'"),
        ({"accumulation": "f16"}, "accumulation='f16': one of"),
        ({"trace": "trace.json"}, r"emulator.trace\(path\) makes one"),
    ],
)
def test_what_no_launch_could_do(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message), emulator.settings(**wrong):
        pass
    assert current_settings() == Settings()


def test_a_trace_that_could_not_be_written_or_shows_nothing(tmp_path) -> None:
    with pytest.raises(FileNotFoundError), emulator.trace(tmp_path / "nowhere" / "trace.json"):
        pytest.fail("found after the run only")
    with pytest.raises(ValueError, match="at least one CTA"), emulator.trace(tmp_path / "trace.json", ctas=0):
        pass

"""Who is named when a run stands still, judged from the signs that its processes give."""

from __future__ import annotations

import pytest

from modstruct.distributed.heartbeat import Heartbeat, Sign, Watch

TIMEOUT = 60.0
EVERY = 5.0


def outcome(histories: dict[int, list[Sign | None]]) -> tuple[str | None, float]:
    """What a watch says first, and when. A history is the signs of one process, its last repeated for ever."""
    watch = Watch(TIMEOUT)
    for look in range(100):
        signs = {rank: history[min(look, len(history) - 1)] for rank, history in histories.items()}
        if found := watch.look(signs, look * EVERY):
            return found, look * EVERY
    return None, look * EVERY


def living(beats: int, stops_at: int | None = None, hurried: bool = True, waits: bool = True) -> list[Sign]:
    """A process that lives; its training stands from `stops_at` on, in a collective if it waits."""
    stops_at = beats if stops_at is None else stops_at
    return [
        Sign(n, min(n, stops_at), hurried, waits and n >= stops_at, f"takes step {min(n, stops_at)}")
        for n in range(beats)
    ]


def test_a_run_that_goes_on_is_left_alone():
    assert outcome({rank: living(100) for rank in range(3)})[0] is None


def test_a_stopped_process_is_named_and_no_other():
    """Its signs end; the others wait in the step that it does not take part in."""
    histories = {0: living(100, stops_at=6), 1: living(6), 2: living(100, stops_at=6)}
    found, when = outcome(histories)
    assert found.startswith("process 1 gives no sign of life")
    assert "takes step 5" in found
    assert "process 0" not in found
    assert "process 2" not in found
    assert TIMEOUT < when <= TIMEOUT + 7 * EVERY


def test_a_process_that_never_gave_a_sign_is_named():
    found, _ = outcome({0: living(100), 1: [None]})
    assert found == "process 1 gives no sign of life (stopped, or its host is lost)"


def test_the_process_that_is_behind_is_named():
    """It still waits for its data; the others are in the step already."""
    found, _ = outcome({0: living(100, stops_at=8), 1: living(100, stops_at=7)})
    assert found == "process 1 does not go on: it takes step 7"


def test_of_processes_in_the_same_step_the_one_that_waits_for_nobody_is_named():
    found, _ = outcome({0: living(100, 8), 1: living(100, 8), 2: living(100, 8, waits=False)})
    assert found == "process 2 does not go on: it takes step 8"


def test_signs_may_come_late():
    """The process that watches knows its own place at once, and that of the one to name a beat later."""
    late = [None, *living(100, 8, waits=False)]
    assert outcome({0: living(100, 8), 1: late})[0] == "process 1 does not go on: it takes step 8"


def test_measurements_may_take_as_long_as_they_take():
    unhurried = {rank: living(100, stops_at=8, hurried=False) for rank in range(2)}
    assert outcome(unhurried)[0] is None
    stopped = unhurried | {1: living(8, hurried=False)}
    assert outcome(stopped)[0].startswith("process 1 gives no sign of life")


def test_a_watch_that_slept_itself_blames_nobody():
    """A suspended job: every process stood, and all go on."""
    watch = Watch(TIMEOUT)
    assert watch.look({0: Sign(1, 1, True, True, ""), 1: Sign(1, 1, True, True, "")}, 0.0) is None
    assert watch.look({0: Sign(2, 1, True, True, ""), 1: Sign(1, 1, True, True, "")}, 10_000.0) is None


@pytest.mark.parametrize("ends_early", [False, True])
def test_counting_passes_the_batches_on(ends_early):
    heartbeat = Heartbeat(30)
    assert heartbeat.position == 0
    seen = []
    for batch in heartbeat.following(iter("abc"), first_step=4):
        seen.append((batch, heartbeat.doing, heartbeat.hurried))
        with heartbeat.unhurried():
            assert not heartbeat.hurried
        if ends_early:
            break
    expected = [("a", "takes step 5", True), ("b", "takes step 6", True), ("c", "takes step 7", True)]
    assert seen == (expected[:1] if ends_early else expected)
    assert not heartbeat.hurried


def test_alone_nothing_is_watched():
    with Heartbeat(30) as heartbeat:
        assert heartbeat._thread is None

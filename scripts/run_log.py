"""What a run has logged for tensorboard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, ScalarEvent


def read_events(run: Path, tags: Sequence[str]) -> dict[str, dict[int, ScalarEvent]]:
    """All that was logged of some tags, by step in order; tags that were not logged are left out.

    Of steps that a run made twice, as it was interrupted, the later values count.

    Args:
        run: the folder with the events' files.
    """
    log = EventAccumulator(str(run), size_guidance={"scalars": 0})
    log.Reload()
    known = set(log.Tags()["scalars"])
    logged = {tag: sorted(log.Scalars(tag), key=lambda event: event.wall_time) for tag in tags if tag in known}
    return {tag: dict(sorted({e.step: e for e in events}.items())) for tag, events in logged.items()}


def read_scalars(run: Path, tags: Sequence[str]) -> dict[str, dict[int, float]]:
    """The values alone of ``read_events``."""
    return {tag: {step: e.value for step, e in events.items()} for tag, events in read_events(run, tags).items()}

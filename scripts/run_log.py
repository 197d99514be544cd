"""What a run has logged for tensorboard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read_scalars(run: Path, tags: Sequence[str]) -> dict[str, dict[int, float]]:
    """All values of some tags, by step in order; tags that were not logged are left out.

    Of steps that a run made twice, as it was interrupted, the later values count.

    Args:
        run: the folder with the events' files.
    """
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    known = set(events.Tags()["scalars"])
    logged = {tag: sorted(events.Scalars(tag), key=lambda event: event.wall_time) for tag in tags if tag in known}
    return {tag: dict(sorted({e.step: e.value for e in values}.items())) for tag, values in logged.items()}

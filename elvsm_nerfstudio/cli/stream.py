"""Shows what a run makes of views as they arrive: a video of each incoming view, the renders at fixed target cameras
after it (above what is really there), and what it cost.

    elvsm stream --load-config RUN/config.yml --output stream.mp4
    elvsm stream --load-config RUN/config.yml --output stream.mp4 --watch FOLDER

The first replays a scene of the run's data. The second watches a folder whose transforms.json grows; frames that are
listed before their image is there, and files that are half written, are waited for.

Every view is appended to one memory, whose canonical frame is fixed by the cameras of the first views: of 2 by
default, since a single camera shows no scale. Beside the video come a JSON with every step's times (the device waited
for, after a warm-up) and PSNR, and the last frame as a PNG.
"""

from __future__ import annotations

from elvsm_nerfstudio.cli.options import parse
from elvsm_nerfstudio.viewer.streaming import StreamOptions, console, stream


def main(args: list[str]) -> None:
    """Command line."""
    options = parse(StreamOptions, "stream", __doc__, args)
    result = stream(options)
    for reason in result["unreadable"].values():
        console.print(f"Left out: {reason}", style="bold yellow", markup=False)
    last = result["steps"][-1]
    console.print(
        f"{last['num_views']} views; the last: append {last['append_ms']:.1f} ms, render {last['render_ms']:.1f} ms",
        markup=False,
    )
    video = options.output
    console.print(f"{video}, {video.with_suffix('.json').name}, {video.with_suffix('.png').name}", markup=False)

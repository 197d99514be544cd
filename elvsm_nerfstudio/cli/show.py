"""Makes a video of new views from photos, a video or a capture, in one call.

    elvsm show PHOTOS                                  # a folder of photos: finds their cameras first
    elvsm show VIDEO.mp4 --num-frames 80               # sharp frames of it
    elvsm show CAPTURE --weights efficient-lvsm-256    # cameras are there already; other weights

In the output folder: video.mp4, sheet.png (what the network got, photos that it did not get, and what it rendered in
their places), show.json (times, scores), a run for `ns-viewer`, `ns-render` and `ns-eval`, and the capture, if it was
made. What to expect of the weights is said before anything is computed.
"""

from __future__ import annotations

import textwrap

from elvsm_nerfstudio.cli.options import parse
from elvsm_nerfstudio.show.journey import ShowOptions, show


def main(args: list[str]) -> None:
    """Command line."""
    options = parse(ShowOptions, "show", __doc__, args)
    shown = show(options, lambda sentence: print(textwrap.fill(sentence, 100)))
    report = shown.report
    if shown.poses is not None:
        print(shown.poses.describe())
    times = f"{report['encode_ms']:.0f} ms for {len(report['context'])} photos, {report['render_ms']:.0f} ms a frame"
    print(f"Encoding took {times}; {report['seconds_after_poses']:.0f} s in all with known cameras.")
    for label, name in (("Video", "video.mp4"), ("Animation", "video.gif"), ("Sheet", "sheet.png")):
        if (shown.folder / name).exists():
            print(f"{label + ':':11}{shown.folder / name}")
    print(f"Live:      ns-viewer --load-config {shown.config}")

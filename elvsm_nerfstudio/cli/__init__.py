"""The command ``elvsm``: a table of verbs, each in a module that is imported only when its verb is called.

A verb's module has ``main(args: list[str])``. What a user can put right is raised as ``ValueError`` or ``OSError`` and
becomes one line here; everything else is a fault of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Optional

from elvsm_nerfstudio import __version__

Verbs = Mapping[str, tuple[str, str]]
"""Of each verb its module in the package of the table, and a line of help."""

VERBS: Verbs = {
    "show": ("show", "from photos, a video or a capture to a video of new views"),
    "poses": ("poses", "find the cameras of photos or of a video (COLMAP, by the extra poses)"),
    "run": ("run", "make a run from weights, without training, for ns-eval, ns-render and ns-viewer"),
    "orbit": ("orbit", "write a camera path around a scene for ns-render"),
    "stream": ("stream", "make a video of views that arrive one by one"),
    "compare": ("compare", "compare methods on the same photos: tables, a page, plots and a video"),
    "plot": ("plot", "plot the PSNR of runs from their tensorboard logs"),
    "weights": ("weights", "list the weights that have a name: what for, licence, size, and whether they are here"),
    "export": ("export", "write a run's weights alone as a safetensors file"),
    "fetch": ("fetch", "download weights that losses and metrics need: lpips, vgg19, saliency-vit"),
    "data": ("data", "render synthetic data sets: objects, rooms, scanned"),
    "check": ("check", "compare the networks with tensors recorded from the official code"),
}
ABOUT = "Efficient-LVSM, feed-forward novel view synthesis, for nerfstudio."
EXAMPLES = """
examples:
  elvsm run --weights pretrained --data YOUR_CAPTURE
  elvsm orbit --load-config outputs/.../config.yml --output orbit.json
  elvsm compare --data YOUR_CAPTURE --methods efficient-lvsm-plus-tiny splatfacto-sparse --output comparison

`elvsm VERB --help` lists a verb's options.
"""


def dispatch(program: str, package: str, verbs: Verbs, args: Sequence[str], about: str, examples: str) -> None:
    """Calls the verb that the first argument names with the rest, or prints the table."""
    if not args or args[0] in ("-h", "--help"):
        width = max(map(len, verbs))
        table = "\n".join(f"  {verb:{width}}  {help}" for verb, (_, help) in verbs.items())
        print(f"usage: {program} VERB [OPTIONS]\n\n{about}\n\nverbs:\n{table}\n{examples}", end="")
        sys.exit(0 if args else 2)
    if args[0] not in verbs:
        close = difflib.get_close_matches(args[0], verbs, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        sys.exit(f"error: {program} {args[0]} is unknown; expected one of {', '.join(verbs)}{hint}")
    importlib.import_module(f"{package}.{verbs[args[0]][0]}").main(list(args[1:]))


def main(args: Optional[Sequence[str]] = None) -> None:
    """Command line."""
    args = sys.argv[1:] if args is None else args
    if list(args) == ["--version"]:
        print(__version__)
        return
    warnings.simplefilter("ignore", FutureWarning)  # of the packages that nerfstudio imports
    try:
        dispatch("elvsm", __name__, VERBS, args, ABOUT, EXAMPLES)
    except BrokenPipeError:  # of `elvsm ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("Stopped.")

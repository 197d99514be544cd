"""Downloads weights that losses, metrics and teachers need.

elvsm fetch lpips
elvsm fetch saliency-vit --output FOLDER
"""

from __future__ import annotations

from elvsm_nerfstudio.cli.options import parse


def main(args: list[str]) -> None:
    """Command line."""
    what = args[0] if args else ""
    if what == "lpips":
        from elvsm_nerfstudio.downloads import lpips_weights

        parse(lpips_weights.FetchLPIPSWeights, "fetch lpips", lpips_weights.__doc__, args[1:]).main()
    elif what == "saliency-vit":
        from elvsm_nerfstudio.downloads import saliency_vit

        parse(saliency_vit.FetchSaliencyViT, "fetch saliency-vit", saliency_vit.__doc__, args[1:]).main()
    elif what in ("-h", "--help"):
        print(__doc__)
    else:
        raise ValueError(f"elvsm fetch {what}: expected lpips or saliency-vit")

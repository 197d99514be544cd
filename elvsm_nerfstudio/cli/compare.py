"""Compares methods on the same photos: tables, a page to look at, plots and videos, from one command.

    elvsm compare --data SCENE_OR_COLLECTION --context-views 4 --output comparison \\
        --methods efficient-lvsm-tiny splatfacto-sparse copy-nearest mean-of-context \\
        --runs efficient-lvsm-tiny=outputs/.../run

All methods get the same context photos and cameras and are asked for the same targets; their pictures are saved
lossless, and one code scores what was saved. Every method runs in a process of its own. Called again with the same
--output, what has been done is kept: methods, numbers of context views and videos can be added, and what failed is
tried again. Tables and page show what the last call names. Open OUTPUT/index.html.
"""

from __future__ import annotations

from elvsm_nerfstudio.cli.options import parse
from elvsm_nerfstudio.compare.comparison import compare
from elvsm_nerfstudio.compare.options import CompareOptions
from elvsm_nerfstudio.compare.runs import console
from elvsm_nerfstudio.compare.scoring import markdown


def main(args: list[str]) -> None:
    """Command line."""
    options = parse(CompareOptions, "compare", __doc__, args)
    console.print(markdown(compare(options)), markup=False, soft_wrap=True)
    console.print(f"{options.output}/index.html, table.md, results.json", markup=False, soft_wrap=True)

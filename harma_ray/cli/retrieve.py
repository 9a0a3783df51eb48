"""``retrieve``."""

import argparse

from harma_ray.cli import shared

_EPILOG = """An image is right if it is of the query's class: the label of a converted split, or the name of the folder
that the image lies in. A query never finds itself: images with the same bytes are left out of its ranking; where a
store knows no hashes of its files (an .npz of another program), those with the same name, and a notice says so.
Everything that is fitted is fitted on the gallery alone. Of images that score the same the wrong ones count first.

examples:
  launch.py embed --run runs/NAME --data data/ucm --split test --out vectors/test
  launch.py embed --run runs/NAME --data data/ucm --split train --out vectors/train
  launch.py retrieve --query vectors/test --gallery vectors/train --report report
  launch.py retrieve --query vectors --gallery vectors --pca 64 --whiten --standardise --expand 5 --alpha 3
  launch.py retrieve --query test.npz --gallery train.npz --index hnsw
"""


def add_commands(commands: shared.Commands) -> None:
    """Adds ``retrieve``."""
    text = "Find images by images, among vectors that `embed` wrote, and measure it by class: Top-k and mAP."
    parser = shared.make_command(commands, "retrieve", _retrieve, text, _EPILOG)
    store = "what `embed` wrote, or an .npz of features and image_paths"
    parser.add_argument("--query", required=True, metavar="STORE", help=f"vectors of the queries: {store}")
    own = "vectors of what is searched; may be the queries' own: then each looks for the others"
    parser.add_argument("--gallery", required=True, metavar="STORE", help=own)
    top = "Top-k: queries with an image of their class among the first k (default: 1 3 5)"
    parser.add_argument("--top", type=int, nargs="+", default=[1, 3, 5], metavar="K", help=top)
    _add_methods(parser)
    found = (
        "how neighbours are found: exact (default; ranks the whole gallery, so that there is a mAP), or by a FAISS "
        "index, for Top-k alone: flat (exact), hnsw, ivfpq (for millions; their recall against flat is printed)"
    )
    parser.add_argument("--index", choices=["exact", "flat", "hnsw", "ivfpq"], default="exact", help=found)
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    page = (
        "write a page that opens offline: queries with the neighbours found, classes, their confusion, a t-SNE "
        "map; of the row that is best by its last figure"
    )
    parser.add_argument("--report", metavar="FOLDER", help=page)


def _add_methods(parser: argparse.ArgumentParser) -> None:
    """Adds the ways to compare."""
    group = parser.add_argument_group("other ways to compare, each a row of the table beside `plain`")
    pca = "in the N directions along which the gallery varies most"
    group.add_argument("--pca", type=int, metavar="N", help=pca)
    whiten = "PCA scaled so that the gallery varies alike along all components (of --pca N if that is given)"
    group.add_argument("--whiten", action="store_true", help=whiten)
    standardise = "each dimension with mean 0 and deviation 1 (called whitening by some guides)"
    group.add_argument("--standardise", action="store_true", help=standardise)
    expand = "search again with the mean of the query and the K images that it found"
    group.add_argument("--expand", type=int, metavar="K", help=expand)
    alpha = "with --expand: the same, images weighted by cosine^A (alpha query expansion; 3 is usual)"
    group.add_argument("--alpha", type=float, metavar="A", help=alpha)


def _retrieve(options: argparse.Namespace) -> None:
    from harma_ray.cli import early_checks

    for store in (options.query, options.gallery):
        early_checks.require_there(store, "give a folder that `launch.py embed` wrote, or an .npz")
    early_checks.figures_path(options.json)
    from harma_ray.cli.retrieve_run import retrieve_and_print
    from harma_ray.vectors.comparison import Wanted

    wanted = Wanted(
        ks=tuple(options.top),
        pca=options.pca,
        whiten=options.whiten,
        standardise=options.standardise,
        expand=options.expand,
        alpha=options.alpha,
        index=options.index,
    )
    retrieve_and_print(options.query, options.gallery, wanted, json_file=options.json, report=options.report)

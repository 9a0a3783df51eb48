"""``convert`` and ``inspect``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from harma_ray.cli.options import add_address, make_command


def add_convert(commands: Any) -> None:
    """Adds ``convert`` with a sub-command for every kind of raw data set."""
    parser = commands.add_parser(
        "convert",
        help="turn a raw data set into Parquet shards",
        description="Turn a raw data set into Parquet shards.",
    )
    kinds = parser.add_subparsers(title="kinds", required=True, metavar="KIND")

    def kind(name: str, text: str) -> argparse.ArgumentParser:
        made = make_command(kinds, name, _convert, text)
        made.set_defaults(kind=name)
        made.add_argument("--out", required=True, help="folder of the data set; each split becomes a folder in it")
        made.add_argument("--resize", type=int, metavar="PIXELS", help="make images smaller: shorter side (default: "
                          "keep every file byte for byte)")  # fmt: skip
        made.add_argument("--max-bad", type=int, default=0, metavar="N", help="missing or unreadable images that may "
                          "be left out, each listed in the manifest (default: 0)")  # fmt: skip
        made.add_argument("--max-pixels", type=int, metavar="N", help="refuse larger images (default: 100 million)")
        made.add_argument("--overwrite", action="store_true", help="replace a split that was made from other inputs")
        made.add_argument("--seed", type=int, default=0, help="seed of the order of rows (default: 0)")
        add_address(made)
        return made

    harma = kind("harma", "HarMA's JSON annotations of one split (training or evaluation rows) and an image folder.")
    harma.add_argument("--annotations", required=True, help="JSON file")
    harma.add_argument("--images", required=True, help="folder that the file's image paths start from")
    harma.add_argument("--split", required=True, help="name of the split: train, val, test")
    karpathy = kind("karpathy", "Karpathy-style JSON (dataset_rsicd.json and the like) and an image folder.")
    karpathy.add_argument("--annotations", required=True, help="JSON file")
    karpathy.add_argument("--images", required=True, help="folder that the file's image names start from")
    folder = kind("folder", "A folder of class folders, split at random or in folders train, val, test.")
    folder.add_argument("--images", required=True, help="folder of class folders")
    folder.add_argument("--caption-template", metavar="TEXT", help='such as "an aerial photograph of {label}"')
    folder.add_argument("--fractions", type=float, nargs=3, default=[0.8, 0.1, 0.1], metavar=("TRAIN", "VAL", "TEST"),
                        help="shares, if there are no split folders (default: 0.8 0.1 0.1)")  # fmt: skip
    scenes = kind("scenes", "Drawn scenes with true captions: data for trials without a data set.")
    scenes.add_argument("--style", default="summer", help="summer, infrared or winter (default: summer)")
    scenes.add_argument("--size", type=int, default=96, help="height and width in pixels (default: 96)")
    scenes.add_argument("--counts", type=int, nargs=3, default=[2000, 200, 200], metavar=("TRAIN", "VAL", "TEST"),
                        help="scenes of each split (default: 2000 200 200)")  # fmt: skip


def _convert(options: argparse.Namespace) -> None:
    from harma_ray.cluster import ray_cluster, require_shared_folder, require_visible
    from harma_ray.data.convert import commands as convert
    from harma_ray.data.convert.writer import WriteSettings
    from harma_ray.files import output_path

    changes = {"max_pixels": options.max_pixels} if options.max_pixels else {}
    settings = WriteSettings(
        resize=options.resize, max_bad=options.max_bad, seed=options.seed, overwrite=options.overwrite, progress=True,
        **changes,
    )  # fmt: skip
    with ray_cluster(options.address) as cluster:
        require_shared_folder(output_path(options.out), cluster)
        require_visible([Path(options.images).expanduser()] if "images" in options else [], cluster)
        if options.kind == "harma":
            manifests = {options.split: convert.convert_harma(
                options.annotations, options.images, options.split, options.out, settings=settings)}  # fmt: skip
        elif options.kind == "karpathy":
            manifests = convert.convert_karpathy(options.annotations, options.images, options.out, settings=settings)
        elif options.kind == "folder":
            manifests = convert.convert_folder(
                options.images, options.out, caption_template=options.caption_template, fractions=options.fractions,
                settings=settings,
            )  # fmt: skip
        else:
            counts = dict(zip(("train", "val", "test"), options.counts, strict=True))
            counts = {split: count for split, count in counts.items() if count}
            manifests = convert.convert_scenes(
                options.out, counts, style=options.style, size=options.size, settings=settings
            )
    for split, manifest in manifests.items():
        left_out = f", {len(manifest.bad)} left out" if manifest.bad else ""
        shards = f"{len(manifest.shards)} shards"
        print(f"{Path(options.out) / split}: {manifest.rows} images, {manifest.captions} captions, {shards}{left_out}")
        for bad in manifest.bad:
            print(f"  left out: {bad.source}: {bad.reason}")


def add_inspect(commands: Any) -> None:
    """Adds ``inspect``."""
    parser = make_command(
        commands, "inspect", _inspect, "Print the facts of a converted data set and draw a contact sheet."
    )
    parser.add_argument("data", help="folder of the data set")
    parser.add_argument("--split", help="one split (default: all)")
    parser.add_argument("--sheet", metavar="FOLDER", help="folder for contact sheets (default: beside the splits)")
    parser.add_argument("--verify", action="store_true", help="decode every image")


def _inspect(options: argparse.Namespace) -> None:
    from harma_ray.data.convert.inspect import contact_sheet, describe, render_facts
    from harma_ray.data.schema import list_splits, open_split

    splits = [options.split] if options.split else list_splits(options.data)
    for name in splits or ["train"]:
        split = open_split(options.data, name)
        print(render_facts(describe(split, verify=options.verify)))
        sheet = Path(options.sheet or options.data) / f"contact-sheet-{name}.png"
        contact_sheet(split, sheet)
        print(f"contact sheet: {sheet}\n")

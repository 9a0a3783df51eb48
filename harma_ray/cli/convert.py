"""``convert`` and ``inspect``."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harma_ray.cli import shared
from harma_ray.errors import count

if TYPE_CHECKING:
    from harma_ray.data.convert.composed import ComposedSource
    from harma_ray.data.convert.shards import TaskMap
    from harma_ray.data.convert.writer import WriteSettings
    from harma_ray.data.manifest import Manifest
    from harma_ray.data.splits import Split
    from harma_ray.task import Task

_LISTED = 5
_CLEANED = """\
Captions are stored as HarMA trains on them: in small letters, without punctuation, cut after 30 words.
Texts that a model is asked with later are made the same."""


def add_commands(commands: shared.Commands) -> None:
    """Adds ``convert``, with a sub-command for every kind of raw data set, and ``inspect``."""
    _add_convert(commands)
    _add_inspect(commands)


def _add_convert(commands: shared.Commands) -> None:
    parser = commands.add_parser(
        "convert",
        help="turn a raw data set into Parquet shards",
        description="Turn a raw data set into Parquet shards.",
    )
    kinds = parser.add_subparsers(title="kinds", required=True, metavar="KIND")

    kind = partial(_add_kind, kinds)
    harma = kind("harma", "HarMA's JSON annotations of one split (training or evaluation rows) and an image folder.")
    harma.add_argument("--annotations", required=True, help="JSON file")
    harma.add_argument("--images", required=True, help="folder that the file's image paths start from")
    harma.add_argument("--split", required=True, help="name of the split: train, val, test")
    karpathy = kind(
        "karpathy", "Karpathy-style JSON (dataset_rsicd.json and the like, dataset_nwpu.json) and an image folder."
    )
    karpathy.add_argument("--annotations", required=True, help="JSON file")
    karpathy.add_argument("--images", required=True, help="folder that the file's image names start from")
    folder = kind("folder", "A folder of class folders, split at random or in folders train, val, test.")
    folder.add_argument("--images", required=True, help="folder of class folders")
    folder.add_argument(
        "--caption-template", metavar="TEXT", help='such as "an aerial photograph of {label}"; stored in small letters'
    )
    folder.add_argument("--fractions", type=float, nargs=3, default=[0.8, 0.1, 0.1], metavar=("TRAIN", "VAL", "TEST"),
                        help="shares, if there are no split folders (default: 0.8 0.1 0.1)")  # fmt: skip
    for made in (harma, karpathy, folder):
        made.epilog = _CLEANED
        made.add_argument(
            "--talks",
            action="store_true",
            help="write talks for visual-instruction pretraining, with questions that captions and classes answer",
        )
        _add_recipe(made)
    _add_talks(kind)
    fashioniq = kind("fashioniq", "One split of FashionIQ, for composed image retrieval.", out_required=False)
    fashioniq.add_argument("--root", required=True, help="folder with captions, image_splits and images")
    fashioniq.add_argument("--split", required=True, help="train or val; the answers of test were never published")
    fashioniq.add_argument("--categories", nargs="+", default=["dress", "toptee", "shirt"], metavar="CATEGORY",
                           help="some of dress, toptee, shirt (default: all)")  # fmt: skip
    cirr = kind("cirr", "One split of CIRR, for composed image retrieval.", out_required=False)
    cirr.add_argument("--root", required=True, help="folder with cirr/captions, cirr/image_splits and the images")
    cirr.add_argument("--split", required=True, help="train, val or test1")
    for made in (fashioniq, cirr):
        made.add_argument("--annotations-only", action="store_true", help="write nothing: check the annotations and "
                          "list all image files that are missing or empty")  # fmt: skip
    _add_drawn(kind)


def _add_drawn(kind: Callable[[str, str], argparse.ArgumentParser]) -> None:
    scenes = kind("scenes", "Drawn scenes with true captions: data for trials without a data set.")
    composed = kind("scenes-cir", "Drawn scenes with sentences that change them, for composed image retrieval.")
    talks = kind("scenes-talk", "Drawn scenes with questions and true answers, for visual-instruction pretraining.")
    _add_recipe(talks)
    for made, size, noun in ((scenes, 96, "scenes"), (composed, 64, "queries"), (talks, 64, "scenes")):
        several = "; several, with commas: each scene has one of them" if made is talks else ""
        made.add_argument("--style", default="summer", help=f"summer, infrared or winter (default: summer){several}")
        made.add_argument("--size", type=int, default=size, help=f"height and width in pixels (default: {size})")
        made.add_argument("--counts", type=int, nargs=3, default=[2000, 200, 200], metavar=("TRAIN", "VAL", "TEST"),
                          help=f"{noun} of each split (default: 2000 200 200)")  # fmt: skip

    own = (
        "lay each image out anew, so that a query and its answer have in common what they hold, not where it is, by "
        "which a model that nobody trained finds it (default: what a sentence does not change stays where it is)"
    )
    composed.add_argument("--own-layouts", action="store_true", help=own)


def _add_talks(kind: Callable[[str, str], argparse.ArgumentParser]) -> None:
    vitp = kind("vitp", "Talks of a ViTP (InternVL) meta file with JSON Lines, for visual-instruction pretraining.")
    vitp.add_argument("--meta", required=True, help="JSON file that names the data sets")
    vitp.add_argument("--images", required=True, help="folder that the data sets' `root` start from")
    vitp.add_argument("--split", default="train", help="name of the split: train, val, test (default: train)")
    vitp.add_argument(
        "--repeat",
        choices=["head", "random"],
        default="head",
        help="lines that a `repeat_time` below 1 keeps: the first, as the released code, or any (default: head)",
    )
    _add_recipe(vitp)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    """Adds ``--recipe`` and ``--set`` of a converter that makes talks."""
    parser.add_argument("--recipe", metavar="NAME", help="refuse talks that are longer than this recipe reads, by its "
                        "tokenizer, tiles and limits (--set model.pretrained=FOLDER)")  # fmt: skip
    shared.add_settings(parser)


def _add_kind(kinds: shared.Commands, name: str, text: str, *, out_required: bool = True) -> argparse.ArgumentParser:
    """Adds a sub-command with the options that all kinds have."""
    made = shared.make_command(kinds, name, _convert, text)
    made.set_defaults(kind=name)
    made.add_argument("--out", required=out_required, help="folder of the data set; each split becomes a folder in "
                      f"it{'' if out_required else ' (not needed with --annotations-only)'}")  # fmt: skip
    made.add_argument("--resize", type=int, metavar="PIXELS", help="make images smaller while they are read: "
                      "shorter side (default: keep every 8-bit file byte for byte)")  # fmt: skip
    made.add_argument("--max-bad", type=int, default=0, metavar="N", help="missing or unreadable images that may "
                      "be left out, each listed in the manifest (default: 0)")  # fmt: skip
    made.add_argument("--max-pixels", type=int, metavar="N", help="refuse images that take more in "
                      "memory, with --resize after reading (default: 100 million)")  # fmt: skip
    made.add_argument("--overwrite", action="store_true", help="replace a split that was made from other inputs")
    made.add_argument("--seed", type=int, default=0, help="seed of the order of rows (default: 0)")
    if not name.startswith("scenes"):
        shared.add_rendering(made, split=True)
    shared.add_address(made)
    return made


def _convert(options: argparse.Namespace) -> None:
    from harma_ray.data.convert.writer import WriteSettings
    from harma_ray.data.manifest import MANIFEST_NAME
    from harma_ray.errors import UserError
    from harma_ray.files import output_path
    from harma_ray.shell import launch_command

    composed = _read_composed(options) if options.kind in ("fashioniq", "cirr") else None
    if composed and options.annotations_only:
        print(composed.report(options.out and output_path(options.out)))
        return
    if options.out is None:
        raise UserError("give the folder of the data set with --out")
    makes_talks = options.kind in ("vitp", "scenes-talk") or getattr(options, "talks", False)
    task = _task_of(options)
    if task and not makes_talks:
        raise UserError("`--recipe` looks at the lengths of talks; add --talks, or leave it out")
    changes = {} if options.max_pixels is None else {"max_pixels": options.max_pixels}
    if not options.kind.startswith("scenes"):
        changes["rendering"] = shared.rendering_from(options)
    with _tasks_on_ray(options, task) as map_tasks:
        settings = WriteSettings(
            resize=options.resize, max_bad=options.max_bad, seed=options.seed, overwrite=options.overwrite,
            progress=True, map_tasks=map_tasks, check=task and task.row_check(), **changes,
        )  # fmt: skip
        manifests = _write(options, settings, composed)
    for split, manifest in manifests.items():
        print(f"{Path(options.out) / split}: {_summarise(manifest)}")
        for bad in manifest.bad[:_LISTED]:
            print(f"  left out: {bad.source}: {bad.reason}")
        if len(manifest.bad) > _LISTED:
            print(f"  and {len(manifest.bad) - _LISTED:,} more: all are in {Path(options.out) / split / MANIFEST_NAME}")
    if makes_talks and not task:
        print("lengths of talks were not looked at, which takes a tokenizer: --recipe NAME refuses what is too long; "
              f"or look: {launch_command('inspect', options.out, '--recipe', 'NAME')}")  # fmt: skip


@contextmanager
def _tasks_on_ray(options: argparse.Namespace, task: Task | None) -> Iterator[TaskMap]:
    """Gives what runs tasks on a cluster, which is started or joined when there are any: not for work that is done."""
    from harma_ray.files import output_path
    from harma_ray.on_ray.cluster import ray_cluster, require_reachable, require_shared_folder, require_visible
    from harma_ray.on_ray.tasks import map_with_ray

    require_reachable(options.address)
    sources = [getattr(options, name) for name in ("images", "root") if name in options]
    if task:
        from harma_ray.on_ray.workers import read_paths

        sources += read_paths(task.config)[1:]
    with ExitStack() as stack:

        @functools.cache
        def start() -> None:
            cluster = stack.enter_context(ray_cluster(options.address, for_tasks=True))
            require_shared_folder(output_path(options.out), cluster)
            require_visible([Path(source).expanduser() for source in sources], cluster)

        def run(function: Callable[[Any], Any], plans: Sequence[Any]) -> Iterator[Any]:
            start()
            yield from map_with_ray(function, plans)

        yield run


def _write(
    options: argparse.Namespace, settings: WriteSettings, composed: ComposedSource | None
) -> dict[str, Manifest]:
    """Runs the converter and returns the manifests of the splits."""
    from harma_ray.data.convert import commands as convert

    if options.kind == "harma":
        return {options.split: convert.convert_harma(
            options.annotations, options.images, options.split, options.out, talks=options.talks, settings=settings
        )}  # fmt: skip
    if options.kind == "karpathy":
        return convert.convert_karpathy(
            options.annotations, options.images, options.out, talks=options.talks, settings=settings
        )
    if options.kind == "folder":
        return convert.convert_folder(
            options.images, options.out, caption_template=options.caption_template, fractions=options.fractions,
            talks=options.talks, settings=settings,
        )  # fmt: skip
    if options.kind == "vitp":
        return {options.split: convert.convert_vitp(
            options.meta, options.images, options.split, options.out, choice=options.repeat, settings=settings
        )}  # fmt: skip
    if composed:
        return {options.split: convert.convert_composed(composed, options.out, settings=settings)}
    draw = {
        "scenes": convert.convert_scenes,
        "scenes-cir": partial(convert.convert_scenes_cir, own_layouts=getattr(options, "own_layouts", False)),
        "scenes-talk": convert.convert_scenes_talk,
    }[options.kind]
    counts = {split: count for split, count in zip(("train", "val", "test"), options.counts, strict=True) if count}
    return draw(options.out, counts, style=options.style, size=options.size, settings=settings)


def _summarise(manifest: Manifest) -> str:
    from harma_ray.data.convert.inspect import describe_rendered
    from harma_ray.data.kinds import KINDS

    queries, kind = manifest.queries, KINDS[manifest.kind]
    more = count(queries.rows, "query") if queries else count(manifest.captions, kind.text)
    left_out = f", {len(manifest.bad)} left out" if manifest.bad else ""
    shown = f"; {describe_rendered(manifest.rendered)}" if manifest.rendered else ""
    if shown and (manifest.options.get("rendering") or {}).get("limits"):
        shown += ", scaled by the statistics of split train"
    rows, shards = count(manifest.rows, manifest.kind.removesuffix("s")), count(len(manifest.shards), "shard")
    return f"{rows}, {more}, {shards}{left_out}{shown}"


def _read_composed(options: argparse.Namespace) -> ComposedSource:
    from harma_ray.data.convert.composed import read_cirr, read_fashioniq

    if options.kind == "cirr":
        return read_cirr(options.root, options.split)
    return read_fashioniq(options.root, options.split, options.categories)


def _add_inspect(commands: shared.Commands) -> None:
    parser = shared.make_command(
        commands, "inspect", _inspect, "Print the facts of a converted data set and draw a contact sheet."
    )
    parser.add_argument("data", help="folder of the data set")
    parser.add_argument("--split", help="one split (default: all)")
    parser.add_argument("--sheet", metavar="FOLDER", help="folder for contact sheets (default: beside the splits)")
    parser.add_argument("--verify", action="store_true", help="decode every image")
    parser.add_argument("--recipe", metavar="NAME", help="tell what rows are to its model too, such as their tokens")
    shared.add_settings(parser)


def _task_of(options: argparse.Namespace) -> Task | None:
    """Returns what ``--recipe`` and ``--set`` name; None without them."""
    from harma_ray.errors import UserError

    if not getattr(options, "recipe", None):
        if getattr(options, "overrides", None):
            raise UserError("`--set` changes a recipe's settings; name it with --recipe")
        return None
    from harma_ray.recipes import make_task, recipe_config
    from harma_ray.settings import build_config, parse_overrides

    config = build_config(recipe_config(options.recipe), parse_overrides(options.overrides))
    from harma_ray.runs import absolute_paths

    return make_task(absolute_paths(config))


def _inspect(options: argparse.Namespace) -> None:
    from harma_ray.data.splits import list_splits, open_split
    from harma_ray.errors import UserError

    names = list_splits(options.data)
    splits = [options.split] if options.split else names or ["train"]
    open_split(options.data, splits[0])
    task = _task_of(options)
    from harma_ray.data.convert.duplicates import compare_captions, find_shared  # torch
    from harma_ray.data.convert.inspect import describe, render_distributions, render_facts
    from harma_ray.data.convert.sheet import contact_sheet

    failed = None
    for split in (open_split(options.data, name) for name in splits):
        print(render_facts(describe(split, verify=options.verify), task and task.backbone.image_size))
        print(_tell_ceiling(split), end="")
        if task is not None:
            facts = task.sample_facts(split)
            print("\n".join([render_distributions(facts.numbers), "", *facts.notes]) + "\n")
        sheet = Path(options.sheet or options.data) / f"contact-sheet-{split.name}.png"
        try:
            contact_sheet(split, sheet)
            print(f"contact sheet: {sheet}\n")
        except UserError as error:  # the facts of the other splits are worth having
            print(f"contact sheet: none: {error}\n")
            failed = failed or error
    if len(names) > 1:
        wanted = [options.split] if options.split else None
        told = [f"WARNING: {each.tell()}" for each in find_shared(options.data, wanted)]
        told = told or ["no image is in two splits"]
        print("\n".join([*told, *(each.tell() for each in compare_captions(options.data, wanted))]))
    if failed and options.sheet:
        raise failed


def _tell_ceiling(split: Split) -> str:
    """Returns what equal captions leave of the recalls by index, in a line; nothing for a split without captions."""
    from harma_ray.data.convert.inspect import read_texts

    captions = read_texts(split)
    if not split.kind.is_image or split.manifest.queries or not all(captions):
        return ""
    import torch

    from harma_ray.retrieval.image_text import RECALL_KS, ceiling_recalls

    image_of_text = torch.tensor([row for row, texts in enumerate(captions) for _ in texts])
    texts = [text for texts in captions for text in texts]
    found = ceiling_recalls(image_of_text, texts, num_images=len(captions))
    told = []
    for name, side in (("I2T", "txt"), ("T2I", "img")):
        figures = " / ".join(f"{found[f'{side}_r{k}']:.1f}" for k in RECALL_KS)
        told.append(f"{name} R@{'/'.join(map(str, RECALL_KS))} {figures}")
    return (
        f"ceiling of recall by index, with equal captions told apart by chance: {', '.join(told)}, "
        f"r_mean {found['r_mean']:.1f} (the figures that count equal captions as right reach 100)\n\n"
    )

"""Figures of a report as PNG files: a map of the embeddings, and how training went.

matplotlib and scikit-learn are imported where they are used: they take a second, and matplotlib looks for a folder for
its caches on import.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from harma_ray.evaluation import Metrics

MAX_POINTS = 2000
_MAX_CLASSES = 40
_MAX_NUMBERED = 30  # classes, in whose confusion the counts are written
_MARKERS = "os^Dv"
_IMAGE, _TEXT, _OTHER = "#3b6fb6", "#d1743a", "#b4bac2"
_DPI = 110


def project(vectors: np.ndarray, seed: int = 0) -> np.ndarray | None:
    """Lays vectors out on a plane with t-SNE.

    Args:
        vectors: fp32[n, E].
        seed: Of the layout.

    Returns:
        fp32[n, 2]; None if there are too few different vectors to lay out.
    """
    if len(vectors) < 4 or vectors.shape[1] < 2 or len(np.unique(vectors, axis=0)) < 3:
        return None
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(vectors) - 1) / 3)
    return TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(vectors)


def draw_embeddings(
    image_embeddings: Tensor, text_embeddings: Tensor, image_of_text: Tensor, labels: Sequence[str | None]
) -> bytes | None:
    """Draws images and captions on one t-SNE map, coloured by class, or by kind if no image has a class.

    At most `MAX_POINTS` are drawn, half of them images, evenly spread over the rows, and one caption of each.

    Args:
        image_embeddings: fp32[N, E].
        text_embeddings: fp32[M, E].
        image_of_text: int64[M].
        labels: N names of classes, or None.

    Returns:
        A PNG file, or None if there is too little to draw.
    """
    num_images = len(image_embeddings)
    rows = np.unique(np.linspace(0, num_images - 1, min(num_images, MAX_POINTS // 2)).round().astype(np.int64))
    with_text, first_text = np.unique(image_of_text.numpy(), return_index=True)
    texts = first_text[np.isin(with_text, rows)]
    points = project(np.concatenate([image_embeddings.numpy()[rows], text_embeddings.numpy()[texts]]))
    if points is None:
        return None
    image_points, text_points = points[: len(rows)], points[len(rows) :]
    image_labels = [labels[row] for row in rows]
    text_labels = [labels[row] for row in image_of_text.numpy()[texts]]
    if not any(image_labels):
        figure = new_figure(6.2, 5.4)
        axes = figure.add_subplot()
        for name, colour, xy in (("images", _IMAGE, image_points), ("captions", _TEXT, text_points)):
            axes.scatter(*xy.T, s=12, c=colour, linewidths=0, label=name)
        _clear(axes, f"{len(rows)} images and {len(texts)} captions (no classes in this split)")
        axes.legend(loc="upper right", fontsize=8)
        return to_png(figure)
    return to_png(_draw_classes({"images": (image_points, image_labels), "captions": (text_points, text_labels)}))


def draw_classes(groups: Mapping[str, tuple[Tensor, Sequence[str]]]) -> bytes | None:
    """Draws vectors on one t-SNE map, a panel for each of one or two groups, coloured by class.

    At most `MAX_POINTS` are drawn, evenly spread over the rows of each group.

    Args:
        groups: Vectors, fp32[N, E], and the N names of their classes, by what the group is called.

    Returns:
        A PNG file, or None if there is too little to draw.
    """
    most, vectors, labels = MAX_POINTS // len(groups), [], {}
    for name, (embeddings, names) in groups.items():
        count = len(embeddings)
        rows = np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))
        vectors.append(embeddings.numpy()[rows])
        labels[name] = [names[row] for row in rows]
    points = project(np.concatenate(vectors))
    if points is None:
        return None
    parts = np.split(points, np.cumsum([len(part) for part in vectors])[:-1])
    return to_png(_draw_classes({name: (part, labels[name]) for name, part in zip(labels, parts, strict=True)}))


def _draw_classes(groups: Mapping[str, tuple[np.ndarray, list]]) -> Figure:
    """Draws a panel for each of one or two groups on the same map; it shows the other group in grey."""
    import matplotlib

    counts = Counter(label for label in next(iter(groups.values()))[1] if label)
    shown = sorted(sorted(counts, key=lambda name: (-counts[name], name))[:_MAX_CLASSES])
    palette = matplotlib.colormaps["tab20"].colors  # pyright: ignore[reportAttributeAccessIssue]
    style = {name: (palette[i % 20], _MARKERS[i // 20 % len(_MARKERS)]) for i, name in enumerate(shown)}
    num_legend_rows = -(-(len(shown) + 1) // 5)
    figure = new_figure(11.5, 5.6 + 0.19 * num_legend_rows)
    panels = figure.subplots(1, len(groups), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (title, own) in zip(panels, groups.items(), strict=True):
        others = {name: other for name, other in groups.items() if name != title}
        for other in others.values():
            axes.scatter(*other[0].T, s=5, c=_OTHER, linewidths=0, alpha=0.6)
        for name in [None, *shown]:
            colour, marker = style.get(name, ("#6d737b", "x")) if name else ("#6d737b", "x")
            place = [i for i, label in enumerate(own[1]) if (label if label in style else None) == name]
            if place:
                width = 0.8 if marker == "x" else 0
                axes.scatter(*own[0][place].T, s=16, color=colour, marker=marker, linewidths=width,
                             label=name or "no or other class")  # fmt: skip
        _clear(axes, f"{len(own[1])} {title}" + "".join(f" (grey: {name})" for name in others))
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, fontsize=7.5, frameon=False, markerscale=1.4)
    return figure


def draw_confusion(counts: np.ndarray, names: Sequence[str], across: str) -> bytes:
    """Draws how often queries of each class (rows) got each class (columns), as shares of a row.

    Args:
        counts: int[N, N].
        names: N names.
        across: What the columns are.

    Returns:
        A PNG file.
    """
    size, shares = len(names), counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    figure = new_figure(min(11.5, 3.5 + 0.32 * size), min(11.5, 2.6 + 0.3 * size))
    axes = figure.add_subplot()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    font = max(3.5, min(9.0, 260 / size))
    axes.set_xticks(range(size), names, rotation=90, fontsize=font)
    axes.set_yticks(range(size), names, fontsize=font)
    if size <= _MAX_NUMBERED:
        for row, column in zip(*np.nonzero(counts), strict=True):
            ink = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=0.8 * font, color=ink)
    axes.set_xlabel(across, fontsize=9)
    axes.set_ylabel("class of the query", fontsize=9)
    figure.colorbar(image, shrink=0.6).ax.tick_params(labelsize=7)
    return to_png(figure)


def draw_curves(records: Sequence[Mapping[str, Any]], metrics: Metrics, start: str = "") -> bytes | None:
    """Draws loss, objective and learning rate over the epochs of a run.

    Args:
        records: Lines of the run's ``metrics.jsonl``.
        metrics: Their objective is drawn.
        start: What the model of step 0 is called; empty: it is not told.

    Returns:
        A PNG file, or None if the records hold no steps.
    """
    steps = [record for record in records if record.get("kind") == "step"]
    if not steps:
        return None
    figure = new_figure(11.5, 3.4)
    loss, found, rate = figure.subplots(1, 3)
    terms = sorted({key for record in steps for key in record if key.startswith("loss_")})
    for key in ("loss", *(terms if len(terms) > 1 else ())):
        axes_style = {"color": _IMAGE, "linewidth": 1.6} if key == "loss" else {"linewidth": 0.9, "alpha": 0.8}
        loss.plot(*_series(steps, key), label=key.removeprefix("loss_") if key != "loss" else "sum", **axes_style)
    if len(terms) > 1:
        loss.legend(fontsize=8)
    evaluations = [record for record in records if record.get("kind") == "evaluation"]
    for split in dict.fromkeys(record.get("split") for record in evaluations):
        x, y = _series([record for record in evaluations if record.get("split") == split], metrics.objective)
        found.plot(x, y, marker="o", markersize=3, label=split or "evaluation")
    if evaluations:
        found.legend(fontsize=8)
    rate.plot(*_series(steps, "learning_rate"), color=_TEXT)
    for axes, title in ((loss, "loss"), (found, metrics.title(metrics.objective)), (rate, "learning rate")):
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("epoch", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if start and any(record.get("step") == 0 for record in evaluations):
        found.set_xlabel(f"epoch (0: {start})", fontsize=9)
    return to_png(figure)


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Returns epochs and values; null, which stands for a value that was not finite, makes a gap."""
    pairs = [(record.get("epoch"), record.get(key)) for record in records]
    points = [(float(x), float("nan") if y is None else float(y)) for x, y in pairs if x is not None]
    return [x for x, _ in points], [y for _, y in points]


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure of a size in inches, without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _clear(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color("#d5d8dc")


def to_png(figure: Figure) -> bytes:
    """Returns a figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()

"""`retrieve`, as a user types it, on stores that nobody encoded."""

import json
import shutil
import sys

import numpy as np
import pytest
from command_line import done, refused
from drawn_store import IDENTITY, draw_store, stored_rows, write_store
from PIL import Image


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    return draw_store(folder, "test", 20, seed=1), draw_store(folder, "train", 40, seed=2)


def columns(line, label):
    """Returns the numbers of a line of the table that begins with a label."""
    assert line.startswith(label)
    return [float(cell.split("-")[0]) for cell in line.removeprefix(label).split()]


def brute_force(query, gallery, ks):
    """Top-k and mAP by numpy, images with the bytes of the query left out."""
    return brute_force_rows(stored_rows(query)[0], stored_rows(gallery)[0], ks)


def brute_force_rows(ours, theirs, ks):
    hits, precisions = {k: [] for k in ks}, []
    for one in ours:
        kept = [other for other in theirs if other["content"] != one["content"]]
        scores = [np.dot(one["vector"], other["vector"]) for other in kept]
        right = np.array([other["label_name"] == one["label_name"] for other in kept])
        right = right[np.lexsort((right, np.negative(scores)))]  # of equal scores the wrong ones first
        if not right.any():
            continue
        for k in ks:
            hits[k].append(right[:k].any())
        precisions.append((np.cumsum(right) / np.arange(1, len(right) + 1))[right].mean())
    return {**{f"top_{k}": 100 * np.mean(values) for k, values in hits.items()}, "map": 100 * np.mean(precisions)}


def test_a_table_by_method_with_intervals_and_chance(stores, tmp_path, capsys):
    query, gallery = stores
    output = done(
        capsys, "retrieve", "--query", query, "--gallery", gallery, "--pca", 3, "--whiten", "--standardise",
        "--expand", 4, "--alpha", 3, "--json", tmp_path / "figures.json",
    )  # fmt: skip
    lines = output.splitlines()
    assert lines[0] == f"queries    {query}: 20 images"
    assert lines[1] == f"gallery    {gallery}: 40 images of 4 classes, width 12"
    names = ["plain", "PCA 3", "whitened 3", "standardised", "expanded 4", "expanded 4, alpha 3", "chance"]
    start = next(number for number, line in enumerate(lines) if line.startswith("plain"))
    assert lines[start - 3].split() == ["Top-1", "Top-3", "Top-5", "mAP"]
    for name, line in zip(names, lines[start : start + len(names)], strict=True):
        assert line.startswith(name)
    outcome = json.loads((tmp_path / "figures.json").read_text())
    assert list(outcome["methods"]) == names[:-1]
    assert outcome["methods"]["plain"]["metrics"] == pytest.approx(brute_force(query, gallery, (1, 3, 5)))
    assert columns(lines[start], "plain")[::2] == pytest.approx(
        list(outcome["methods"]["plain"]["metrics"].values()), abs=0.06
    )
    assert outcome["chance"]["top_1"] == pytest.approx(25)
    assert outcome["encoder"] == IDENTITY


def test_a_store_searched_by_itself_never_finds_the_query_or_its_copies(stores, tmp_path, capsys):
    rows, manifest = stored_rows(stores[1])
    copy = {**rows[0], "id": "port/copy.png", "label_name": "port"}
    alone = {**rows[1], "id": "sea/1.png", "label_name": "sea", "content": "of no other"}
    store = write_store(tmp_path / "store", [*rows, copy, alone], manifest)
    output = done(
        capsys, "retrieve", "--query", store, "--gallery", store, "--json", tmp_path / "f.json", "--top", 2, 1
    )
    assert "41 images; each looks for the others" in output
    assert "notice: no query, as the gallery has no other of the class: 1 image (sea/1.png)" in output
    kept = json.loads((tmp_path / "f.json").read_text())
    assert kept["left_out"] == ["sea/1.png"]
    assert list(kept["chance"]) == ["top_1", "top_2", "map"]
    assert kept["methods"]["plain"]["metrics"] == pytest.approx(brute_force(store, store, (1, 2)))


def test_queries_that_are_in_another_gallery_are_told(stores, tmp_path, capsys):
    rows, manifest = stored_rows(stores[1])
    other = write_store(tmp_path / "other", rows[:8], manifest)
    output = done(capsys, "retrieve", "--query", other, "--gallery", stores[1], "--json", tmp_path / "f.json")
    assert "notice: in the gallery too (the same bytes), which never find themselves: 8 queries" in output
    found = json.loads((tmp_path / "f.json").read_text())["methods"]["plain"]["metrics"]
    assert found == pytest.approx(brute_force(other, stores[1], (1, 3, 5)))


def test_spaces_are_fitted_on_the_gallery_alone(stores, tmp_path, capsys):
    """Queries that lie elsewhere and vary otherwise would move a space that were fitted on them too."""
    rows, manifest = stored_rows(stores[0])
    rng = np.random.default_rng(3)
    for row in rows:
        moved = np.array(row["vector"]) * np.geomspace(3, 0.3, 12) + rng.normal(size=12) * 0.4 + 0.3
        row["vector"] = (moved / np.linalg.norm(moved)).astype(np.float32)
    query = write_store(tmp_path / "query", rows, manifest)
    done(
        capsys, "retrieve", "--query", query, "--gallery", stores[1], "--pca", 5, "--whiten", "--standardise",
        "--json", tmp_path / "f.json",
    )  # fmt: skip
    found = json.loads((tmp_path / "f.json").read_text())["methods"]
    (theirs, _), figures = stored_rows(stores[1]), {}
    for fitted in ("gallery", "both"):
        on = np.array([row["vector"] for row in (theirs if fitted == "gallery" else [*theirs, *rows])], np.float64)
        variances, directions = np.linalg.eigh(np.cov(on.T))
        variances, directions = variances[:-6:-1], directions[:, :-6:-1]
        whitened = directions / np.sqrt(variances + 1e-6 * variances.max())
        for name, matrix in (("PCA 5", directions), ("whitened 5", whitened), ("standardised", np.diag(1 / on.std(0)))):
            spaces = []
            for own in (rows, theirs):
                moved = (np.array([row["vector"] for row in own]) - on.mean(axis=0)) @ matrix
                moved /= np.linalg.norm(moved, axis=1, keepdims=True)
                spaces.append([{**row, "vector": vector} for row, vector in zip(own, moved, strict=True)])
            figures[fitted, name] = brute_force_rows(*spaces, (1, 3, 5))
    for name in ("PCA 5", "whitened 5", "standardised"):
        assert found[name]["metrics"] == pytest.approx(figures["gallery", name])
        assert found[name]["metrics"] != pytest.approx(figures["both", name])


def test_an_index_gives_top_k_and_says_what_it_misses(stores, tmp_path, capsys):
    pytest.importorskip("faiss")
    query, gallery = stores
    exact = brute_force(query, gallery, (1, 3, 5))
    for kind in ("flat", "hnsw"):
        output = done(
            capsys, "retrieve", "--query", query, "--gallery", gallery, "--index", kind, "--expand", 2,
            "--json", tmp_path / "f.json",
        )  # fmt: skip
        found = json.loads((tmp_path / "f.json").read_text())["methods"]
        assert found["plain"]["metrics"] == pytest.approx({name: exact[name] for name in ("top_1", "top_3", "top_5")})
        assert "mAP" not in output
        assert ("plain: recall@5 against flat 100.0 %, of 20 queries" in output) == (kind == "hnsw")
        assert f"expanded 2: index {kind}" in output


def test_the_page_shows_the_images_and_opens_offline(stores, tmp_path, capsys):
    query, gallery = stores
    output = done(
        capsys, "retrieve", "--query", query, "--gallery", gallery, "--standardise", "--report", tmp_path / "report"
    )
    assert f"report     {tmp_path / 'report' / 'index.html'}" in output
    assert "notice" not in output
    page = (tmp_path / "report" / "index.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    for title in ("Results", "Some queries", "Failures", "Classes", "Confusion", "Embeddings"):
        assert f">{title}</h2>" in page
    assert "Everything below is of: " in page
    pictures = sorted(path.name for path in (tmp_path / "report").glob("*.png"))
    assert {"confusion.png", "embeddings.png", "retrievals.png"} <= set(pictures)


def test_a_page_without_its_images_says_why(stores, tmp_path, capsys):
    store, images = tmp_path / "train.store", tmp_path / "train"
    rows, manifest = stored_rows(stores[1])
    shutil.copytree(manifest["data"], images)
    write_store(store, rows, {**manifest, "data": str(images)})
    arguments = ("retrieve", "--query", store, "--gallery", store, "--report")
    assert "notice" not in done(capsys, *arguments, tmp_path / "one")
    (images / rows[0]["id"]).unlink()
    told = f"the report shows no images: {images / rows[0]['id']} is not there any more"
    assert told in done(capsys, *arguments, tmp_path / "two")
    assert "is not there any more" in (tmp_path / "two" / "index.html").read_text()
    shutil.rmtree(images)
    assert f"{images} is not there any more" in done(capsys, *arguments, tmp_path / "three")


def test_an_image_that_was_replaced_since_is_not_shown(stores, tmp_path, capsys, caplog):
    images = tmp_path / "train"
    rows, manifest = stored_rows(stores[1])
    shutil.copytree(manifest["data"], images)
    store = write_store(tmp_path / "train.store", rows, {**manifest, "data": str(images)})
    arguments = ("retrieve", "--query", store, "--gallery", store, "--report")
    done(capsys, *arguments, tmp_path / "one")
    for row in rows[1:]:
        shutil.copyfile(images / rows[0]["id"], images / row["id"])
    done(capsys, *arguments, tmp_path / "two")
    assert "are not those any more that were embedded (" in caplog.text
    sheets = [np.asarray(Image.open(tmp_path / name / "retrievals.png")) for name in ("one", "two")]
    assert (sheets[0] != sheets[1]).any()
    (images / rows[0]["id"]).write_bytes(b"no picture")  # would be one line that ends the command, if it were opened
    done(capsys, *arguments, tmp_path / "three")


def test_names_tell_images_apart_where_a_store_has_no_hashes_and_that_is_said(stores, tmp_path, capsys):
    rows, _ = stored_rows(stores[1])
    for name, own in (("few", rows[:8]), ("all", rows)):
        features = np.array([row["vector"] for row in own], np.float32)
        np.savez(tmp_path / f"{name}.npz", features=features, image_paths=np.array([row["id"] for row in own]))
    few, every = tmp_path / "few.npz", tmp_path / "all.npz"
    output = done(capsys, "retrieve", "--query", few, "--gallery", every)
    assert f"notice: {few} has no hashes of files: images of the same name are taken for the same" in output
    assert "notice: in the gallery too (the same name), which never find themselves: 8 queries" in output
    assert "no hashes" in done(capsys, "retrieve", "--query", few, "--gallery", stores[1])
    assert "no hashes" not in done(capsys, "retrieve", "--query", stores[0], "--gallery", stores[1])


def test_stores_that_do_not_fit_are_one_line(stores, tmp_path, capsys):
    query, (rows, manifest) = stores[0], stored_rows(stores[1])

    def changed(name, rows, **more):
        return write_store(tmp_path / name, rows, {**manifest, **more})

    nan = [{**rows[0], "vector": [np.nan] * 12}, *rows[1:]]
    for gallery, told in [
        (changed("one", rows[::4]), "at least two classes, but all 10 images are of class `farm`"),
        (changed("bare", [{**row, "label_name": None} for row in rows]), "gallery image needs a class, but 40 of 40"),
        (changed("nan", nan), "NaN or infinite numbers in 1 vector (farm/000.png)"),
        (changed("narrow", [{**row, "vector": row["vector"][:5]} for row in rows], width=5), "one width, but those of"),
        (changed("other", rows, encoder={**IDENTITY, "backbone": "xyz"}), "not made alike (backbone: abc and xyz)"),
        (changed("names", [{**row, "label_name": "x" + row["id"][:1]} for row in rows]), "image of its class in"),
        (tmp_path, "is no store of vectors"),
    ]:
        assert told in refused(capsys, "retrieve", "--query", query, "--gallery", gallery)


def test_what_the_gallery_does_not_allow_is_one_line_and_leaves_nothing(stores, tmp_path, capsys):
    query, gallery = stores
    for arguments, told in [
        (("--pca", 13), "components <= min(40 gallery images, 12 dimensions), got 13"),
        (("--pca", 0), "got 0"),
        (("--top", 1, 41), "`--top` must lie in 1..40"),
        (("--top", 0), "`--top` must be different numbers from 1, got 0"),
        (("--expand", 41), "`--expand` must lie in 1..40"),
        (("--expand", 0), "`--expand` must lie in 1..40"),
        (("--alpha", 3), "give --expand K too"),
        (("--expand", 3, "--alpha", -1), "`--alpha` must be at least 0, got -1"),
        (("--json", tmp_path / "no" / "f.json"), "does not exist"),
    ]:
        both = ("retrieve", "--query", query, "--gallery", gallery, "--report", tmp_path / "report")
        assert told in refused(capsys, *both, *arguments)
    assert not (tmp_path / "report").exists()


def test_a_gallery_smaller_than_what_is_asked_of_it_is_one_line(stores, tmp_path, capsys):
    rows, manifest = stored_rows(stores[1])
    few = write_store(tmp_path / "few", rows[:8], manifest)
    for arguments, told in [
        (("--pca", 9, "--top", 1), "components <= min(8 gallery images, 12 dimensions), got 9; use at most 8"),
        (("--whiten", "--pca", 9, "--top", 1), "got 9; use at most 8"),
        (("--top", 1, 9), "`--top` must lie in 1..8, the images that a query may find, but got 9"),
        (("--expand", 9), "`--expand` must lie in 1..8"),
        (("--index", "ivfpq"), "an ivfpq index needs at least 256 vectors, got 8; use flat"),
    ]:
        if "--index" in arguments:
            pytest.importorskip("faiss")
        assert told in refused(capsys, "retrieve", "--query", stores[0], "--gallery", few, *arguments)
    both = ("retrieve", "--query", few, "--gallery", few)
    assert "`--top` must lie in 1..7" in refused(capsys, *both, "--top", 8)
    assert "plain" in done(capsys, *both, "--pca", 8, "--top", 7)


def test_without_faiss_only_an_index_is_missing(stores, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    query, gallery = stores
    done(capsys, "retrieve", "--query", query, "--gallery", gallery)
    error = refused(capsys, "retrieve", "--query", query, "--gallery", gallery, "--index", "flat")
    assert 'pip install "harma-ray[vitp]"' in error

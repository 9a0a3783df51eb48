import json
import logging
import shutil

import numpy as np
import pytest
from PIL import Image
from raster_files import bare_tiff, save, write_raster

from harma_ray.data.convert.commands import convert_folder
from harma_ray.data.convert.inspect import describe, render_facts
from harma_ray.data.convert.writer import WriteSettings
from harma_ray.data.images import decode_image
from harma_ray.data.manifest import Manifest
from harma_ray.data.rendering import Rendering
from harma_ray.data.splits import open_split
from harma_ray.errors import UserError

RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(100 * n, 100 * n + 400, (10, 14, 3)).astype(np.uint16) for n in range(12)]


@pytest.fixture
def raw(tmp_path):
    for number, values in enumerate(IMAGES):
        save(tmp_path / "raw" / "train" / "farm" / f"{number}.tif", bare_tiff(values, 2))
    Image.fromarray(IMAGES[3].astype(np.uint8)).save(tmp_path / "raw" / "train" / "farm" / "plain.png")
    return tmp_path / "raw"


def _convert(raw, out, *, rule=None, **settings):
    rendering = Rendering.parse(**rule) if rule else None
    settings = WriteSettings(rendering=rendering, shard_bytes=2000, row_group_bytes=1000, **settings)
    return convert_folder(raw, out, settings=settings)["train"]


def _stored(out):
    table = open_split(out, "train").read(["source", "image"])
    return {row["source"].split("/")[-1]: row["image"] for row in table.to_pylist()}


def _stretched(values, low, high):
    return np.rint(np.clip((values.astype(np.float64) - low) * 255 / (high - low), 0, 255)).astype(int)


def test_wide_images_without_a_rule_stop_the_conversion_with_one_line(raw, tmp_path):
    with pytest.raises(UserError) as caught:
        _convert(raw, tmp_path / "data")
    message = str(caught.value)
    assert message.startswith("12 of 13 images hold more than 8 bits, such as ")
    assert "3 x uint16, numbers " in message
    assert "--stretch none|bits|minmax|percentile, and --bands R,G,B" in message
    assert "\n" not in message
    assert _convert(raw, tmp_path / "data", max_bad=12).rows == 1


@pytest.mark.parametrize("stretch", ["bits", "minmax", "percentile", "percentile:5,60"])
def test_statistics_of_the_split_are_those_of_all_pixels_together(raw, tmp_path, stretch):
    rule = {"stretch": stretch, **({} if stretch == "bits" else {"statistics": "split"})}
    manifest = _convert(raw, tmp_path / "data", rule=rule)
    together = np.concatenate([values.reshape(-1, 3) for values in IMAGES])
    limits = {
        "bits": np.array([[0] * 3, [2047] * 3]),  # the largest number lies between 1024 and 2047
        "minmax": np.stack([together.min(0), together.max(0)]),
        "percentile": np.percentile(together, [2, 98], axis=0),
        "percentile:5,60": np.percentile(together, [5, 60], axis=0),
    }[stretch]
    np.testing.assert_allclose(manifest.rendered.rule["limits"]["3 x uint16"], limits.T)
    stored = _stored(tmp_path / "data")
    for number, values in enumerate(IMAGES):
        expected = np.stack([_stretched(values[..., b], *limits[:, b]) for b in range(3)], -1)
        np.testing.assert_array_equal(np.asarray(decode_image(stored[f"{number}.tif"])), expected)
        assert stored[f"{number}.tif"].startswith(b"\x89PNG")


def test_statistics_of_numbers_of_32_bits_are_close_in_bounded_memory(tmp_path):
    images = [RNG.normal(290, 8, (1, 30, 40)).astype(np.float32) for _ in range(6)]
    for number, values in enumerate(images):
        save(tmp_path / "raw" / "train" / "heat" / f"{number}.tif", write_raster(values))
    rule = {"stretch": "percentile", "statistics": "split"}
    limits = _convert(tmp_path / "raw", tmp_path / "data", rule=rule).rendered.rule["limits"]["1 x float32"]
    np.testing.assert_allclose(limits[0], np.percentile(np.concatenate(images), [2, 98]), rtol=1 / 2048)


def _split(raw, tmp_path):
    """Moves the brighter half of the images into a second split, one that is larger than any of train's included."""
    for number in range(6, 12):
        name = f"farm/{number}.tif"
        save(raw / "val" / name, bare_tiff(IMAGES[number] * 2, 2))
        (raw / "train" / name).unlink()
    return Rendering.parse(stretch="percentile", statistics="split", nodata="nan"), tmp_path / "data"


def test_what_is_found_of_train_holds_for_the_splits_beside_it(raw, tmp_path, caplog):
    rule, out = _split(raw, tmp_path)
    made = convert_folder(raw, out, settings=WriteSettings(rendering=rule))
    limits = np.percentile(np.concatenate([values.reshape(-1, 3) for values in IMAGES[:6]]), [2, 98], axis=0)
    np.testing.assert_allclose(made["val"].rendered.rule["limits"]["3 x uint16"], limits.T)
    rows = open_split(out, "val").read(["source", "image"]).to_pylist()
    for row in rows:
        values = IMAGES[int(row["source"].split("/")[-1].removesuffix(".tif"))] * 2
        expected = np.stack([_stretched(values[..., b], *limits[:, b]) for b in range(3)], -1)
        np.testing.assert_array_equal(np.asarray(decode_image(row["image"])), expected)
    assert len(rows) == 6
    assert "own statistics" not in caplog.text
    again = convert_folder(raw, out, settings=WriteSettings(rendering=rule))
    assert again["val"].to_json() == made["val"].to_json()


@pytest.mark.parametrize("train", ["not there", "by another rule"])
def test_a_split_scaled_by_its_own_statistics_says_so(raw, tmp_path, caplog, train):
    rule, out = _split(raw, tmp_path)
    if train == "by another rule":
        other = WriteSettings(rendering=Rendering.parse(stretch="minmax"))
        convert_folder(raw, out, settings=other)
        shutil.rmtree(out / "val")
    shutil.rmtree(raw / "train")
    made = convert_folder(raw, out, settings=WriteSettings(rendering=rule))["val"]
    limits = np.percentile(np.concatenate([values.reshape(-1, 3) for values in IMAGES[6:]]) * 2, [2, 98], axis=0)
    np.testing.assert_allclose(made.rendered.rule["limits"]["3 x uint16"], limits.T)
    assert "val: rasters are scaled by the split's own statistics, for no split `train` beside it" in caplog.text


def test_each_image_has_its_own_statistics_by_default_and_eight_bits_are_kept(raw, tmp_path):
    manifest = _convert(raw, tmp_path / "data", rule={"stretch": "minmax"})
    stored = _stored(tmp_path / "data")
    assert stored["plain.png"] == (raw / "train" / "farm" / "plain.png").read_bytes()
    for number, values in enumerate(IMAGES):
        expected = np.stack([_stretched(band, band.min(), band.max()) for band in values.transpose(2, 0, 1)], -1)
        np.testing.assert_array_equal(np.asarray(decode_image(stored[f"{number}.tif"])), expected)
    assert manifest.rendered.images == {"3 x uint16": 12}
    assert manifest.options["rendering"]["stretch"] == "minmax"


def test_another_rule_is_another_conversion(raw, tmp_path):
    _convert(raw, tmp_path / "data", rule={"stretch": "bits:11"})
    first = open_split(tmp_path / "data", "train").fingerprint
    assert _convert(raw, tmp_path / "data", rule={"stretch": "bits:11"}).rows == 13
    assert open_split(tmp_path / "data", "train").fingerprint == first
    with pytest.raises(UserError, match=r"made differently \(rendering\)"):
        _convert(raw, tmp_path / "data", rule={"stretch": "bits:12"})
    _convert(raw, tmp_path / "data", rule={"stretch": "bits:12"}, overwrite=True)
    assert open_split(tmp_path / "data", "train").fingerprint != first


@pytest.mark.parametrize("calls", [1, 4, 9])
def test_a_conversion_cut_off_in_either_pass_goes_on_and_gives_the_same(raw, tmp_path, calls):
    rule = {"stretch": "percentile", "statistics": "split"}
    clean = _convert(raw, tmp_path / "clean", rule=rule)
    done = []

    def interrupted(function, plans):
        for plan in plans:
            if len(done) == calls:
                raise KeyboardInterrupt
            done.append(plan)
            yield function(plan)

    with pytest.raises(KeyboardInterrupt):
        _convert(raw, tmp_path / "data", rule=rule, map_tasks=interrupted)
    again = []

    def counted(function, plans):
        for plan in plans:
            before = {path.name for path in plan.path.parent.iterdir()}
            result = function(plan)
            again.append({path.name for path in plan.path.parent.iterdir()} != before)
            yield result

    assert _convert(raw, tmp_path / "data", rule=rule, map_tasks=counted).to_json() == clean.to_json()
    assert again.count(False) == calls
    assert _stored(tmp_path / "data") == _stored(tmp_path / "clean")


def test_a_manifest_of_an_older_version_is_read():
    text = json.dumps({
        "rows": 1, "captions": 1, "shards": [], "inputs": {}, "options": {}, "bad": [], "tool_version": "0.1.0",
        "schema_version": 1, "kind": "images", "queries": None,
    })  # fmt: skip
    assert Manifest.from_json(text, origin="here").rendered is None


def test_scenes_are_made_smaller_while_they_are_read(tmp_path):
    values = np.kron(IMAGES[0], np.ones((20, 20, 1), np.uint16))  # 200 x 280
    save(tmp_path / "raw" / "train" / "farm" / "scene.tif", bare_tiff(values, 2))
    rule = {"stretch": "bits:10"}
    with pytest.raises(UserError, match=r"280 x 200 pixels; the limit is 9,000 pixels: .*--resize"):
        _convert(tmp_path / "raw", tmp_path / "data", rule=rule, max_pixels=9000)
    _convert(tmp_path / "raw", tmp_path / "data", rule=rule, max_pixels=9000, resize=20)
    (data,) = _stored(tmp_path / "data").values()
    assert decode_image(data).size == (28, 20)


# --- what inspect tells ---


def test_inspect_tells_depths_bands_and_no_data(raw, tmp_path):
    holed = np.stack([IMAGES[0][..., 0].astype(np.int16)] * 2 + [IMAGES[0][..., 1].astype(np.int16)])
    holed[:, :5] = -32768
    save(raw / "train" / "farm" / "holed.tif", write_raster(holed, nodata=-32768))
    _convert(raw, tmp_path / "data", rule={"stretch": "minmax"})
    facts = describe(open_split(tmp_path / "data", "train"))
    assert facts.depths == {"3 x uint8": 14}
    assert facts.split.manifest.rendered.images == {"3 x int16": 1, "3 x uint16": 12}
    assert facts.split.manifest.rendered.nodata_percent == pytest.approx(50 / 13, abs=1e-3)
    text = render_facts(facts)
    assert "rendered from 3 x int16 (1), 3 x uint16 (12) by --stretch minmax, no data 3.8 %" in text
    assert "WARNING" not in text


@pytest.mark.parametrize(
    ("low", "high", "warning"),
    [(0, 7, "look black"), (245, 255, "look white"), (100, 103, "look alike"), (0, 255, None)],
)
def test_images_that_look_wrong_are_warned_of(tmp_path, low, high, warning, caplog):
    for number in range(10):
        tile = RNG.integers(low, high + 1, (8, 8, 3)).astype(np.uint8)
        path = tmp_path / "raw" / "train" / "farm" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(tile).save(path)
    with caplog.at_level(logging.WARNING):
        _convert(tmp_path / "raw", tmp_path / "data")
    text = render_facts(describe(open_split(tmp_path / "data", "train")))
    assert (warning in caplog.text and warning in text) if warning else ("look" not in caplog.text)
    assert ("WARNING" in text) == bool(warning)


@pytest.mark.parametrize(
    ("option", "text"),
    [("bands", "1,2"), ("bands", "0,1,2"), ("stretch", "sqrt"), ("stretch", "percentile:98,2"), ("stretch", "bits:x"),
     ("stretch", "none:3"), ("nodata", "black"), ("statistics", "split")],
)  # fmt: skip
def test_options_that_make_no_rule_are_refused(option, text):
    with pytest.raises(UserError, match=f"`--{option}`"):
        Rendering.parse(**{option: text})

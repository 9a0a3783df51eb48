import itertools
import logging
import os
import re

import pytest
from PIL import Image

from harma_ray.cli import main
from harma_ray.data.image_files import EXTENSIONS, find_images, readable_name
from harma_ray.data.images import FORMATS
from harma_ray.errors import UserError


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


def _touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def _original_name(readable):
    """Returns the name that `readable_name` was given, as Python spells it."""
    parts = re.split(r"\\x([0-9a-f]{2})", readable)
    raw = b"".join(bytes.fromhex(part) if number % 2 else part.encode() for number, part in enumerate(parts))
    return os.fsdecode(raw)


def _names(found):
    return [found.name(path) for path in found.images]


def test_extensions_are_those_of_the_formats_that_are_decoded():
    assert {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS} == EXTENSIONS


def test_hidden_entries_junk_and_other_files_are_left_out_and_counted(root, caplog):
    _touch(root, "b/1.JPG", "b/a/2.tif", "a/3.jp2", "a.png", "deep.tif/4.gif")
    _touch(root, "b/.ipynb_checkpoints/1-checkpoint.jpg", "b/._1.JPG", ".git/5.png", ".DS_Store")
    _touch(root, "b/@eaDir/1.JPG/SYNOFILE_THUMB_M.jpg", "__MACOSX/b/1.jpg", "b/Thumbs.db")
    _touch(root, "b/1.tfw", "b/a/2.TFW", "readme", "c/photo.heic", "c/more/photo.heic", "b/list.txt")
    (root / "empty").mkdir()
    found = find_images(root)
    assert _names(found) == ["a/3.jp2", "a.png", "b/1.JPG", "b/a/2.tif", "deep.tif/4.gif"]
    assert found.left_out == {
        "hidden": [".DS_Store", ".git/", "b/._1.JPG", "b/.ipynb_checkpoints/"],
        "by-products of other programs": ["__MACOSX/", "b/@eaDir/", "b/Thumbs.db"],
        "no images": ["b/1.tfw", "b/a/2.TFW", "b/list.txt", "c/more/photo.heic", "c/photo.heic", "readme"],
        "folders without images": ["c/", "empty/"],
    }
    assert len(found.left_out["hidden"]) == 4
    with caplog.at_level(logging.WARNING):
        found.warn()
    assert "left out: hidden: 4 (.DS_Store, .git/, b/._1.JPG, ...)" in caplog.text
    assert "no images: 6 (2 .tfw, 2 .heic, 1 .txt, ...; such as b/1.tfw)" in caplog.text


def test_the_name_of_the_root_itself_does_not_matter(tmp_path):
    _touch(tmp_path / ".cache" / "@eaDir", "1.png")
    assert _names(find_images(tmp_path / ".cache" / "@eaDir")) == ["1.png"]


def test_links_to_files_and_folders_are_followed(root, tmp_path):
    _touch(root, "farm/0.jpg")
    _touch(tmp_path / "disk", "more/1.jpg", "more/deep/2.jpg", "one.jpg", "notes.txt")
    os.symlink("../../disk/more", root / "farm/part2")
    os.symlink(tmp_path / "disk/one.jpg", root / "farm/linked.jpg")
    os.symlink("nowhere.jpg", root / "farm/lost.jpg")
    os.symlink("nowhere", root / "farm/unmounted")
    os.symlink("self", root / "farm/self")
    os.mkfifo(root / "farm/pipe.jpg")
    found = find_images(root)
    assert _names(found) == [
        f"farm/{name}" for name in ("0.jpg", "linked.jpg", "lost.jpg", "part2/1.jpg", "part2/deep/2.jpg")
    ]
    assert found.left_out == {"links that lead nowhere": ["farm/self", "farm/unmounted"], "no files": ["farm/pipe.jpg"]}


@pytest.mark.parametrize("target", [".", "..", "../..", "../b"])
def test_links_that_lead_in_a_circle_are_refused(root, target):
    _touch(root, "a/1.jpg", "b/2.jpg")
    os.symlink("../a", root / "b/back")  # with a/link -> ../b: from one into the other for ever
    os.symlink(target, root / "a/link")
    with pytest.raises(UserError, match=r"/link is a link to .*never ends; remove the link|/back is a link to"):
        find_images(root)


def test_circles_behind_a_link_out_of_the_root_are_refused(root, tmp_path):
    _touch(root, "1.jpg")
    _touch(tmp_path, "disk/deep/2.jpg")
    os.symlink("../disk", root / "out")
    os.symlink("..", tmp_path / "disk/deep/up")
    with pytest.raises(UserError, match=r"out/deep/up is a link to .*disk, which it lies in itself"):
        find_images(root)


def test_a_file_that_links_reach_twice_counts_once_in_each_group(root, tmp_path):
    _touch(tmp_path / "disk", "1.jpg")
    _touch(root, "farm/own.jpg", "lake/own.jpg")
    os.symlink("own.jpg", root / "farm/a-link.jpg")
    for place in ("farm/x", "farm/y", "lake/z"):
        os.symlink(tmp_path / "disk", root / place)
    found = find_images(root)
    assert len(found.images) == 6
    once = found.once_per(lambda path: path.relative_to(root).parts[0])
    assert _names(once) == ["farm/own.jpg", "farm/x/1.jpg", "lake/own.jpg", "lake/z/1.jpg"]
    assert once.left_out == {"reached a second time through links": ["farm/a-link.jpg", "farm/y/1.jpg"]}
    first = {found.name(path): found.name(to) for path, to in found.first_paths().items()}
    assert first["lake/z/1.jpg"] == first["farm/y/1.jpg"] == "farm/x/1.jpg"
    assert first["farm/a-link.jpg"] == "farm/own.jpg"


def test_names_that_are_not_utf8_are_escaped_and_taken_back(root, caplog):
    raw = "农田".encode("gbk") + b"\\1.jpg"
    _touch(root, os.fsdecode(raw), "农田.jpg")
    found = find_images(root)
    (escaped,) = set(_names(found)) - {"农田.jpg"}
    assert escaped.isascii() is False or escaped.startswith("\\x")
    assert os.fsencode(_original_name(escaped)) == raw
    with caplog.at_level(logging.WARNING):
        found.warn()
    assert f"1 names are not UTF-8; they are kept with \\xNN for such bytes: {escaped}" in caplog.text


def test_escaping_of_names_is_reversible_and_leaves_others_alone():
    pieces = [b"a", b"\\", b"\\x41", b"\xff", "é".encode(), b"x5c"]
    raws = [b"".join(parts) for count in (1, 2, 3) for parts in itertools.product(pieces, repeat=count)]
    readable = {os.fsdecode(raw): readable_name(os.fsdecode(raw)) for raw in raws}
    assert len(set(readable.values())) == len(readable)
    assert all(_original_name(told) == name for name, told in readable.items())
    assert all(told.encode() for told in readable.values())
    assert all(readable_name(name) == name for name in ("a/b.jpg", "C:\\x.jpg", "é\\xyz", "农田.jpg"))


def test_arguments_that_are_not_utf8_are_refused_before_ray_is_started(capsys):
    assert main(["convert", "folder", "--images", os.fsdecode(b"in\xff"), "--out", "out"]) == 2
    assert "arguments must be UTF-8, got in\\xff; name the folder" in capsys.readouterr().err

"""What a Ray job gets of the working folder, and what is said of paths that lead into its copy."""

import os
import shutil
import zipfile
from pathlib import Path

import pytest
from command_line import refused

ROOT = Path(__file__).parents[2]
LIMIT = 100 * 2**20
"""What Ray's dashboard takes of an uploaded working folder."""


@pytest.mark.filterwarnings("ignore")
def test_an_upload_holds_the_code_and_no_weights_data_or_runs(tmp_path):
    from ray._private.runtime_env.packaging import create_package

    folder, package = tmp_path / "harma_ray", tmp_path / "package.zip"
    left = shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs", "data", "demo", "*cache")
    shutil.copytree(ROOT, folder, ignore=lambda at, names: left(at, names) if Path(at) == ROOT else {"__pycache__"})
    code = {path.relative_to(folder).as_posix() for path in (folder / "harma_ray").rglob("*") if path.is_file()}
    big = ["RS5M_ViT-B-32_RET-2.pt", "RN50x4.pt", "released.pth", "clip.safetensors", "open_clip_pytorch_model.bin",
           "data/rsitmd/train/part-0.parquet", "runs/one/metrics.jsonl", "demo/backbone.safetensors", "rsitmd.zip",
           "RSICD_images/park_1.tif", "report/index.html", "vectors/images.parquet", "weights/a.ckpt"]  # fmt: skip
    for name in big:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with open(folder / name, "wb") as file:
            os.truncate(file.fileno(), LIMIT)  # takes no room on the disk
    create_package(str(folder), package, include_gitignore=True)
    names = set(zipfile.ZipFile(package).namelist())
    assert not names & set(big)
    assert {*code, "launch.py", "search_spaces/harma.yaml"} <= names
    assert package.stat().st_size < LIMIT // 10


@pytest.fixture
def job_folder(tmp_path, monkeypatch):
    """The copy of a working folder that a job runs in, with weights that were uploaded in spite of all."""
    folder = tmp_path / "session_x" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    folder.mkdir(parents=True)
    (folder / "there.safetensors").write_bytes(b"")
    (folder / "data").mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--recipe", "harma-rsitmd-geo", "--data", "SCENES", "--runs", "RUNS"),
        ("train", "--recipe", "harma-scenes", "--data", "SCENES", "--runs", "RUNS", "--set", "model.pretrained=no.pth"),
        ("train", "--recipe", "harma-scenes", "--data", "SCENES", "--runs", "RUNS", "--set",
         "model.pretrained=there.safetensors"),
        ("train", "--recipe", "harma-scenes", "--data", "data", "--runs", "RUNS"),
        ("train", "--resume", "runs/one"),
        ("train", "--recipe", "scenes-cir-combiner", "--from", "runs/stage1", "--data", "SCENES", "--runs", "RUNS"),
        ("tune", str(ROOT / "search_spaces" / "quick.yaml"), "--data", "SCENES", "--runs", "RUNS", "--set",
         "model.pretrained=demo/backbone.safetensors"),
        ("tune", "--resume", "runs/search"),
        ("evaluate", "--run", "runs/one"),
        ("evaluate", "--zero-shot", "--recipe", "harma-rsitmd-geo", "--data", "SCENES"),
    ],
    ids=lambda arguments: " ".join(arguments[:3])[-50:],
)  # fmt: skip
def test_a_job_is_told_what_its_working_folder_lacks(capsys, job_folder, scenes, tmp_path, arguments):
    places = {"SCENES": scenes, "RUNS": tmp_path / "runs"}
    error = refused(capsys, *(places.get(argument, argument) for argument in arguments))
    assert "this job's working folder, a copy" in error
    assert "absolute path on storage that all machines mount" in error
    assert not (tmp_path / "runs").exists()


def test_a_tag_is_no_file_that_a_job_could_lack(capsys, job_folder, scenes, tmp_path):
    error = refused(
        capsys, "train", "--recipe", "harma-scenes", "--data", scenes, "--runs", tmp_path, "--set",
        "model.pretrained=laion2b_s34b_b79k",
    )  # fmt: skip
    assert "working folder" not in error

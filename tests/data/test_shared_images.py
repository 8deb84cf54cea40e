"""Images that stand in two splits are found by their content and told; nothing is read that need not be."""

import os
from pathlib import Path

import pytest
from image_folders import CONFIG, write

from stratavit import image_loader
from stratavit.data.shared_images import report_shared_images, shared_images


def files(root, **contents):
    for name, content in contents.items():
        (root / name).write_bytes(content)
    return {name: str(root / name) for name in contents}


def test_pairs_are_files_of_the_same_content_under_any_name(tmp_path, monkeypatch):
    at = files(tmp_path, a=b"one", b=b"two", c=b"longer", d=b"two", e=b"six", f=b"nothing of that size")
    os.mkfifo(tmp_path / "pipe")  # reading it would wait
    read, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.append(path.name), read_bytes(path))[1])
    others = [at["d"], at["e"], at["f"], str(tmp_path / "pipe"), str(tmp_path / "gone")]
    assert shared_images([at["a"], at["b"], at["c"], str(tmp_path / "absent")], others) == [(at["b"], at["d"])]
    assert sorted(read) == ["a", "b", "d", "e"]


@pytest.mark.parametrize(("most", "found"), [(10, 10), (2, 2), (0, 0)])
def test_at_most_so_many_are_looked_for(tmp_path, most, found):
    paths = [*files(tmp_path, **{f"n{number}": str(number).encode() for number in range(10)}).values()]
    assert len(shared_images(paths, paths, most)) == found


@pytest.mark.parametrize("split", ["val", "train"])
def test_a_data_set_whose_splits_overlap_is_told(tmp_path, capsys, split):
    write(tmp_path, "train/a/0.png", "train/b/0.bmp", "val/a/0.jpg", "val/b/1.bmp")
    loader = image_loader(tmp_path, CONFIG, "train" if split == "val" else "val", 2)
    capsys.readouterr()
    report_shared_images(loader, tmp_path, split)
    said = capsys.readouterr().err
    assert "1 of 2 images" in said
    assert said.count("\n") == 1
    (tmp_path / "val/b/1.bmp").write_bytes(b"another")
    report_shared_images(loader, tmp_path, split)
    assert capsys.readouterr().err == ""


def test_no_other_split_is_no_error(tmp_path, capsys):
    write(tmp_path, "train/a/0.png", "train/b/0.png")
    loader = image_loader(tmp_path, CONFIG, "train", 2)
    capsys.readouterr()
    report_shared_images(loader, tmp_path, "val")
    (tmp_path / "val").mkdir()  # without images
    report_shared_images(loader, tmp_path, "val")
    assert capsys.readouterr().err == ""

"""Permissions of what is written are those of the umask, which no thread sees changed."""

import os
import stat

import pytest

from stratavit.files import folders

pytestmark = pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o027, 0o077])
def test_permissions_are_those_of_the_umask_which_is_left_alone(umask, tmp_path, monkeypatch):
    before = os.umask(umask)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(os, "umask", None)  # which would change it for all threads
            folders.write_folder(tmp_path / "folder", lambda path: (path / "a").write_text("x"))
            folders.write_file(tmp_path / "file", b"x")
    finally:
        assert os.umask(before) == umask
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"folder": 0o777 & ~umask, "a": 0o666 & ~umask, "file": 0o666 & ~umask}

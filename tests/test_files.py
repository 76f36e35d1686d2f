"""Files that appear whole or not at all, and the processor's names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from structmat import files, processor


def test_what_was_there_stays_until_all_is_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_text(path, "old")

    def fail(draft: Path) -> None:
        draft.write_text("half")
        assert path.read_text() == "old"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(path, fail)
    assert path.read_text() == "old"
    files.write_text(path, "neü")
    assert path.read_text(encoding="utf-8") == "neü"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_name_may_be_found_while_writing(tmp_path: Path) -> None:
    def write(draft: Path) -> str:
        return f"{draft.write_text('four')} letters"

    assert files.write_named(tmp_path, write) == tmp_path / "4 letters"
    assert [p.read_text() for p in tmp_path.iterdir()] == ["four"]


@pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX")
def test_others_may_read_what_is_written_as_the_user_allows(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "file", "")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_the_processor_has_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processor.processor_name()
    assert processor.processor_name() in processor.processor_generation()
    monkeypatch.setattr(processor, "_facts", lambda: {"model name": "Fast", "model": "7", "stepping": "1"})
    assert processor.processor_name.__wrapped__() == "Fast"
    assert processor.processor_generation.__wrapped__() == "Fast 7 1"
    monkeypatch.setattr(processor, "_facts", dict)
    assert processor.processor_name.__wrapped__() == processor.processor_generation.__wrapped__() != ""

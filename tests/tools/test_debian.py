"""tools/debian.py without a network: where packages come from, what is kept, what is said when nothing can be had."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tools import debian
from vfio_vmbus.errors import UnavailableError

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None or shutil.which("apt-get") is None, reason="no dpkg here")


def test_sources_of_both_formats_are_understood(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text(
        "# deb http://comment.example/debian bookworm main\n"
        "deb-src http://source.example/debian bookworm main\n"
        "deb [arch=amd64 signed-by=/key.gpg] http://one.example/debian bookworm main contrib\n"
    )
    (tmp_path / "sources.list.d" / "two.list").write_text("deb http://two.example/debian trixie main\n")
    (tmp_path / "sources.list.d" / "three.sources").write_text(
        "Types: deb deb-src\n# a comment\nURIs: http://three.example/debian http://four.example/debian\nSuites: trixie trixie-updates\n"
        "Components: main\n\nTypes: deb-src\nURIs: http://five.example/debian\nSuites: trixie\n\n"
        "Types: deb\nEnabled: no\nURIs: http://six.example/debian\nSuites: trixie\n"
    )
    assert list(debian._sources(tmp_path)) == [
        ("http://one.example/debian", ["bookworm"]),
        ("http://two.example/debian", ["trixie"]),
        ("http://three.example/debian", ["trixie", "trixie-updates"]),
        ("http://four.example/debian", ["trixie", "trixie-updates"]),
    ]


@needs_dpkg
def test_packages_are_unpacked_once(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: hello\nVersion: 1.0\nArchitecture: all\nMaintainer: N\nDescription: hello\n"
    )
    (tree / "hello").write_text("hello")
    fetched = []

    def fetch(work: Path) -> None:
        fetched.append(work)
        debian.run(["dpkg-deb", "--build", str(tree), str(work / "hello_1.0_all.deb")])

    def build(root: Path) -> None:
        (root / "hello").rename(root / "built")

    for _ in range(2):
        root = debian.kept(tmp_path / "cache", "hello", fetch, build)
        assert (root / "built").read_text() == "hello"
        assert (root / "packages.txt").read_text() == "hello_1.0_all\n"
    assert len(fetched) == 1
    assert not fetched[0].exists()


@needs_dpkg
def test_nothing_half_made_is_left(tmp_path: Path) -> None:
    def fetch(work: Path) -> None:
        (work / "broken_1.0_all.deb").write_text("no package")

    with pytest.raises(UnavailableError, match="dpkg failed"):
        debian.kept(tmp_path / "cache", "broken", fetch)
    assert list((tmp_path / "cache").iterdir()) == []


@needs_dpkg
def test_what_cannot_be_built_is_not_kept(tmp_path: Path) -> None:
    def build(root: Path) -> None:
        raise UnavailableError("no compiler")

    with pytest.raises(UnavailableError, match="no compiler"):
        debian.kept(tmp_path / "cache", "nothing", lambda work: None, build)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_machine_without_apt_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match="apt-get is not here: this needs Debian"):
        debian.kept(tmp_path / "cache", "anything", lambda work: None)


def test_a_release_without_keys_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "_KEYRING", tmp_path / "no-keys")
    with pytest.raises(UnavailableError, match="packages could not be trusted"):
        debian.Apt.release(tmp_path, ["trixie"])

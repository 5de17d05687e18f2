"""`bilevel data`: data sets that have to be downloaded once."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, final

from bilevel._files import write_atomically
from bilevel.commands.raised import Failure


@final
@dataclass(frozen=True)
class Archive:
    """A file to download: where it is, and its MD5 checksum."""

    url: str
    md5: str


_OFFICIAL = "https://github.com/brendenlake/omniglot/raw/master/python"
OMNIGLOT: Mapping[str, Archive] = MappingProxyType(
    {
        "images_background.zip": Archive(f"{_OFFICIAL}/images_background.zip", "68d2efa1b9178cc56df9314c21c6e718"),
        "images_evaluation.zip": Archive(f"{_OFFICIAL}/images_evaluation.zip", "6b91aef0f799c5bb55b94e3f2daec811"),
    }
)

_CHUNK, _TIMEOUT = 1 << 20, 60.0
_MOST = 64 << 20  # bytes of an archive: the larger one has 10 million


def data(name: str, out: str, source: str | None) -> None:
    """Download a data set into the folder `out`, or take it from the folder `source`, and write `<name>.npz` to `out`.

    Raises:
        ValueError: if there is no data set of that name, or files are incomplete.
        FileNotFoundError: if `source` lacks a file.
        ImportError: if numpy or Pillow is missing.
        Failure: if a download did not succeed.
    """
    from bilevel.tasks.omniglot_files import convert_omniglot

    if name != "omniglot":
        raise ValueError(f"there is no data set {name!r}. There is: omniglot.")
    folder = Path(out) if source is None else Path(source)
    if source is None:
        for file, archive in OMNIGLOT.items():
            download(archive, folder / file)
    for file, archive in OMNIGLOT.items():
        verify(archive, folder / file)
    print("converting ...")
    target = convert_omniglot(folder, Path(out) / f"{name}.npz")
    print(f"wrote {target}. Use it by `--set data={target}`, or `bilevel.tasks.omniglot({str(target)!r})`.")


def verify(archive: Archive, file: Path) -> None:
    """Refuse an archive that is not the one that is known by its name; one that is not there is not missed here.

    Raises:
        ValueError: naming both checksums.
    """
    if not file.is_file() or (file.parent / file.stem).is_dir():  # what is unpacked is read instead
        return
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, _md5).hexdigest()
    if found != archive.md5:
        raise ValueError(
            f"{str(file)!r} has the MD5 checksum {found} instead of {archive.md5}, that of {archive.url}: it is"
            f" damaged, or another file. Copy it again; an archive of your own can be unpacked to a folder"
            f" {file.stem}/ beside it."
        )


def download(archive: Archive, target: Path) -> None:
    """Download a file unless it is there already; it appears when it is complete and its checksum is right.

    Raises:
        Failure: if the server cannot be reached, or sends something else.
    """
    if target.is_file():
        with target.open("rb") as file:
            if hashlib.file_digest(file, _md5).hexdigest() == archive.md5:
                print(f"{target} is there already")
                return
    print(f"downloading {archive.url} ...")
    try:
        write_atomically(target, lambda file: _fetch(archive, file))
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise Failure(
            f"{archive.url} could not be downloaded: {error}. Run the command again when there is a connection (files"
            " that are complete are kept), or bring the archives here by other means and name their folder: `--from`."
        ) from error


def _fetch(archive: Archive, file: BinaryIO) -> None:
    digest = _md5()
    with urllib.request.urlopen(archive.url, timeout=_TIMEOUT) as response:
        while chunk := response.read(_CHUNK):
            digest.update(chunk)
            file.write(chunk)
            if file.tell() > _MOST:
                raise Failure(
                    f"{archive.url} sends more than {_MOST} bytes, which the archive has not; it was not kept."
                )
    if digest.hexdigest() != archive.md5:
        raise Failure(
            f"{archive.url} sent a file with the MD5 checksum {digest.hexdigest()} instead of {archive.md5}; it was not"
            " kept. The connection may have been cut, or a proxy may have answered: try again."
        )


def _md5() -> hashlib._Hash:
    return hashlib.md5(usedforsecurity=False)

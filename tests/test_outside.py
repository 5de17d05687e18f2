"""Files that nobody vouches for: each hostile one is one clear error, and its neighbour is read."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from bilevel import Estimate, minimize
from bilevel.commands import data as data_command
from bilevel.few_shot import read_best
from bilevel.outside import archives, arrays, checkpoints, images
from bilevel.outside.archives import Limits, opened_zip
from bilevel.outside.arrays import read_arrays
from bilevel.problems import logistic_breast_cancer, multinomial_digits, quadratic, ridge_diabetes
from bilevel.problems._data import load
from bilevel.tasks import convert_omniglot, image_folder, mini_imagenet, omniglot
from bilevel.tasks.omniglot_files import LIMITS

np = pytest.importorskip("numpy")
Image: Any = pytest.importorskip("PIL.Image")
ROOT = Path(__file__).resolve().parent.parent


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


# Images


def picture(kind: str, size: tuple[int, int] = (9, 7), mode: str = "RGB") -> bytes:
    made = io.BytesIO()
    Image.new(mode, size, 1).save(made, kind)
    return made.getvalue()


def shape_of(content: bytes | Path) -> tuple[int, int]:
    width, height = images.open_image(content, "the image", "RGB").size
    return height, width


@pytest.mark.parametrize("kind", ["EPS", "BMP", "GIF", "TIFF", "PPM", "ICO", "PCX", "PDF"])
def test_only_png_and_jpeg_are_decoded_whatever_the_name(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.png").write_bytes(picture(kind))
    with pytest.raises(ValueError, match=r"a.png' cannot be read as an image in the format PNG or JPEG"):
        images.open_image(tmp_path / "a.png", str(tmp_path / "a.png"), "L")


def test_no_other_decoder_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.init()

    asked: list[str] = []
    for name in Image.OPEN.keys() - {"PNG", "JPEG"}:
        monkeypatch.setitem(Image.OPEN, name, (asked.append, lambda prefix, name=name: asked.append(name)))
    with pytest.raises(ValueError, match="PNG or JPEG"):
        shape_of(picture("EPS"))
    assert asked == []
    with pytest.raises(OSError, match="cannot identify"):
        Image.open(io.BytesIO(picture("EPS")))
    assert "EPS" in asked  # by Pillow as it is


@pytest.mark.parametrize(("kind", "name"), [("PNG", "a.png"), ("JPEG", "a.jpg"), ("PNG", "a.jpg"), ("JPEG", "a.png")])
def test_png_and_jpeg_are_read_by_their_content(tmp_path: Path, kind: str, name: str) -> None:
    (tmp_path / name).write_bytes(picture(kind))
    assert shape_of(tmp_path / name) == (7, 9)


@pytest.mark.parametrize("size", [(8200, 8200), (20_000, 10_000)])
def test_an_image_of_too_many_pixels_is_not_decoded(size: tuple[int, int]) -> None:
    bomb = picture("PNG", size, "1")
    assert len(bomb) < 100_000
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"'the image' has .*pixels.* are read. Scale it down"):
            shape_of(bomb)
    assert shape_of(picture("PNG", (2000, 1500), "1")) == (1500, 2000)


def test_an_image_file_that_is_too_long_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    content = picture("PNG")
    monkeypatch.setattr(images, "BYTES", len(content))
    assert shape_of(content) == (7, 9)
    with pytest.raises(ValueError, match=rf"has {len(content) + 1} bytes; images of at most {len(content)} are read"):
        shape_of(content + b"\0")


@settings(max_examples=15)
@given(st.integers(0, 2000), st.binary(min_size=1, max_size=8), st.sampled_from(["PNG", "JPEG"]))
def test_a_damaged_image_is_one_error(place: int, other: bytes, kind: str) -> None:
    content = bytearray(picture(kind))
    content[place % len(content) : place % len(content) + len(other)] = other
    try:
        shape_of(bytes(content[: len(content) - place % 3]))
    except ValueError as error:
        assert "'the image'" in str(error)  # noqa: PT017  (it may be read as well)


def test_folders_of_images_say_which_formats_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(picture("PNG"))
    (tmp_path / "a" / "notes.txt").write_text("no image")
    assert image_folder(tmp_path, 4).pixels(torch.tensor([0]), torch.tensor([0])).shape == (1, 3, 4, 4)
    (tmp_path / "a" / "2.bmp").write_bytes(picture("BMP"))
    with pytest.raises(ValueError, match=r"formats PNG and JPEG. Got .*2.bmp'. Convert it"):
        image_folder(tmp_path, 4)


@pytest.mark.parametrize("name", ["/etc/passwd", "../../a.jpg", "..\\a.jpg", "b/../../a.jpg"])
def test_a_table_names_files_of_its_folder_only(tmp_path: Path, name: str) -> None:
    (tmp_path / "images").mkdir()
    for part in ("train", "val", "test"):
        (tmp_path / "images" / f"{part}.jpg").write_bytes(picture("JPEG"))
        (tmp_path / f"{part}.csv").write_text(f"filename,label\n{part}.jpg,{part}\n")
    assert mini_imagenet(tmp_path, 4).train.names == ("train",)
    (tmp_path / "train.csv").write_text(f"filename,label\n{name},a\n")
    with pytest.raises(ValueError, match="which is not in the folder images/"):
        mini_imagenet(tmp_path, 4)


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"filename,label\n\xff\xfe,a\n", "no table"), (b"filename,label\na.jpg\n", "a filename and a label in each")],
)
def test_a_damaged_table_is_one_error(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "images").mkdir()
    for part in ("train", "val", "test"):
        (tmp_path / f"{part}.csv").write_bytes(content)
    with pytest.raises(ValueError, match=why):
        mini_imagenet(tmp_path, 4)


# Archives


def zipped(path: Path, members: dict[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", how) as made:
        for name, content in members.items():
            made.writestr(name, content)
    return path


def refused(path: Path, why: str, limits: Limits = Limits()) -> None:
    with pytest.raises(ValueError, match=why), opened_zip(path, limits) as archive:
        [archive.read(name) for name in archive.names]


SMALL = Limits(members=3, member=1000, total=2500)


def test_an_archive_within_its_limits_is_read(tmp_path: Path) -> None:
    members = {"a/": b"", "a/b.txt": b"b" * 1000, "a/c..d": b"c" * 1000}
    for how in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = zipped(tmp_path / "a.zip", members, how)
        with zipfile.ZipFile(path, "a") as made:
            made.comment = b"with a comment"
        with opened_zip(path, SMALL) as archive:
            assert {name: archive.read(name) for name in archive.names} == {
                name: content for name, content in members.items() if not name.endswith("/")
            }


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ({str(k): b"" for k in range(4)}, "has 4 members; at most 3 are read"),
        ({"a": b"0" * 1001}, "'a' that has 1001 bytes when unpacked; at most 1000 are read"),
        ({str(k): b"0" * 900 for k in range(3)}, "has 2700 bytes when unpacked; at most 2500 are read"),
        ({"/etc/a": b""}, "'/etc/a' that has a name that leads out"),
        ({"a/../../b": b""}, "that has a name that leads out"),
        ({"..\\b": b""}, "that has a name that leads out"),
        ({"C:/b": b""}, "that has a name that leads out"),
    ],
)
def test_an_archive_beyond_its_limits_is_refused_by_its_directory(
    tmp_path: Path, members: dict[str, bytes], why: str
) -> None:
    refused(zipped(tmp_path / "a.zip", members), why, SMALL)


@pytest.mark.parametrize("how", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressions_without_a_limit_are_refused(tmp_path: Path, how: int) -> None:
    refused(zipped(tmp_path / "a.zip", {"a": b"0"}, how), "other means than deflate")


def test_links_are_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as made:
        made.writestr(info, "/etc/passwd")
    refused(tmp_path / "a.zip", "'link' that is a link")


def test_a_member_is_not_read_beyond_what_the_directory_says(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", {"a": b"0" * 5000})
    content = path.read_bytes()
    path.write_bytes(content.replace(struct.pack("<L", 5000), struct.pack("<L", 500)))
    refused(path, "cannot|can be read", SMALL)


@pytest.mark.parametrize("large", [False, True])
def test_a_directory_of_too_many_members_is_not_parsed(tmp_path: Path, large: bool) -> None:
    path = zipped(tmp_path / "a.zip", {"a": b""})
    content = path.read_bytes()
    end = content.rindex(b"PK\5\6")
    size = 1 << 31
    if large:
        record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, size, 0)
        place = struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
        path.write_bytes(content[:end] + record + place + content[end:])
    else:
        path.write_bytes(content[: end + 12] + struct.pack("<L", size) + content[end + 16 :])
    refused(path, f"directory of the archive .* has {size} bytes")


@settings(max_examples=25)
@given(st.integers(0, 300), st.binary(min_size=1, max_size=4), st.integers(0, 40))
def test_a_damaged_archive_is_one_error(tmp_path_factory: Any, place: int, other: bytes, short: int) -> None:
    path = zipped(tmp_path_factory.mktemp("zip") / "a.zip", {"a": b"text" * 9, "b": b"\0"})
    content = bytearray(path.read_bytes())
    content[place % len(content) : place % len(content) + len(other)] = other
    path.write_bytes(content[: len(content) - short])
    try:
        with opened_zip(path) as archive:
            [archive.read(name) for name in archive.names]
    except ValueError as error:
        assert "a.zip'" in str(error)  # noqa: PT017


def test_the_archives_of_omniglot_are_read_within_limits(tmp_path: Path) -> None:
    drawing = "images_background/Alphabet_of_the_Magi/character01/0709_01.png"
    zipped(tmp_path / "images_evaluation.zip", {})
    zipped(tmp_path / "images_background.zip", {drawing: bytes(2 << 20)})
    with pytest.raises(ValueError, match=r"0709_01.png' that has 2097152 bytes when unpacked"):
        convert_omniglot(tmp_path, tmp_path / "o.npz")


def test_archives_from_a_folder_are_those_that_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = zipped(tmp_path / "images_background.zip", {})
    right = hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()
    data_command.verify(data_command.Archive("https://a", right), file)
    for name, archive in data_command.OMNIGLOT.items():
        zipped(tmp_path / name, {})
        with pytest.raises(ValueError, match=f"MD5 checksum {right} instead of {archive.md5}"):
            data_command.verify(archive, tmp_path / name)
    with pytest.raises(ValueError, match="MD5 checksum"):
        data_command.data("omniglot", str(tmp_path / "out"), str(tmp_path))
    (tmp_path / "images_background").mkdir()  # unpacked: that is read, and has no checksum
    data_command.verify(data_command.OMNIGLOT[file.name], file)


# Arrays


def saved(path: Path, **content: Any) -> Path:
    np.savez(path, **content)
    return path


def raw_npy(path: Path, header: str, body: bytes = b"") -> Path:
    """An array whose header says what it likes."""
    text = header.encode() + b" " * (-len(header) % 64) + b"\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body
    return zipped(path, {"X.npy": content, "y.npy": content})


def test_arrays_of_objects_are_refused_without_advice_to_trust_them(tmp_path: Path) -> None:
    hostile = np.empty(1, dtype=object)
    hostile[0] = Touch(tmp_path / "touched")
    path = saved(tmp_path / "a.npz", X=hostile, y=np.zeros(1))
    with pytest.raises(ValueError, match=r"array 'X' of the dtype object, which is not read") as caught:
        ridge_diabetes(data=path)
    assert "pickle" not in str(caught.value)
    with pytest.raises(ValueError, match="dtype object"):
        omniglot(saved(tmp_path / "o.npz", images=hostile))
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("kind", ["pickle", "npy", "text", "nothing"])
def test_what_is_no_npz_file_is_refused_without_advice_to_trust_it(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.npz"
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    content = {"pickle": pickle.dumps(Touch(tmp_path / "touched")), "npy": array.getvalue(), "text": b"text"}
    path.write_bytes(content.get(kind, b""))
    for read in (lambda: ridge_diabetes(data=path), lambda: omniglot(path)):
        with pytest.raises(ValueError, match=r"is not a zip file that can be read") as caught:
            read()
        assert "pickle" not in str(caught.value)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000,), }", "more numbers than there can be"),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (10**20,), }", "its header cannot be read"),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999999999999,), }", "at most"),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,), }", "its shape is none"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", "dtype object"),
        ("{'descr': '<M8[s]', 'fortran_order': False, 'shape': (1,), }", "dtype datetime64"),
        ("{'descr': [('a', '<f8')], 'fortran_order': False, 'shape': (1,), }", "which is not read"),
        ("[" * 5000, "its header cannot be read"),
        (" " * 11_000, "its header cannot be read"),
        ("__import__('os').mkdir('touched')", "its header cannot be read"),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (9,), }", "its numbers cannot be read"),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (), }", "more than its shape says"),
    ],
)
def test_a_header_is_looked_at_before_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, header: str, why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=why) as caught:
        ridge_diabetes(data=raw_npy(tmp_path / "a.npz", header, bytes(16)))
    assert "pickle" not in str(caught.value) and "max_header_size" not in str(caught.value)
    assert not (tmp_path / "touched").exists()


def test_a_small_file_of_large_arrays_is_read_up_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, X=np.zeros(100_000), y=np.ones(3), text=np.array(["a", "b"]))
    assert path.stat().st_size < 2000
    with pytest.raises(ValueError, match=r"'X' of shape \(100000,\) with 800000 bytes; at most 799999 more are read"):
        read_arrays(path, lambda name: True, "sklearn", most=799_999)
    found = read_arrays(path, lambda name: True, "sklearn", most=800_100)
    assert found["X"].shape == (100_000,) and found["y"].tolist() == [1, 1, 1] and list(found["text"]) == ["a", "b"]
    assert list(read_arrays(path, "y".__eq__, "sklearn", most=24)) == ["y"]  # the others are left alone


def test_a_small_file_does_not_become_a_large_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "FREE", 10_000)
    path = tmp_path / "a.npz"
    np.savez_compressed(path, X=np.zeros((500, 100)), y=np.ones(500))
    held = path.stat().st_size
    with pytest.raises(ValueError, match=rf"'.*a.npz' has {held} bytes, and its arrays up to 'X' have 400000: .* 100"):
        ridge_diabetes(data=path)
    ridge_diabetes(data=(np.load(path)["X"] + np.eye(500, 100), np.arange(500.0)))  # as the error says
    noise = np.random.default_rng(0).normal(size=(500, 100))
    np.savez_compressed(path, X=noise * (noise > 1), y=noise[:, 0])  # as data are that compress well
    ridge_diabetes(data=path)


def test_a_name_that_is_in_an_archive_twice_is_refused(tmp_path: Path) -> None:
    path, content = tmp_path / "a.npz", io.BytesIO()
    np.save(content, np.ones(9))
    with zipfile.ZipFile(path, "w") as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("X.npy", "y.npy", "X.npy"):
            made.writestr(name, content.getvalue())
    with pytest.raises(ValueError, match=r"a member 'X.npy' that is there twice"):
        ridge_diabetes(data=path)


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ((0, 3), "as many inputs as targets, and at least one"),
        ((0,), "at least one"),
        ((1, 3), "the train part has no sample"),
        ((2, 3), "the val part has no sample|leaves none for test"),
        ((9, 0), "at least one feature"),
    ],
)
@pytest.mark.parametrize("build", [ridge_diabetes, logistic_breast_cancer, multinomial_digits], ids=["r", "l", "m"])
def test_too_few_samples_are_one_error_that_names_the_file(
    tmp_path: Path, build: Any, shape: tuple[int, ...], why: str
) -> None:
    path, y = tmp_path / "a.npz", np.arange(float(shape[0])) % 2
    np.savez(path, X=np.ones(shape), y=y.astype(int))
    with pytest.raises(ValueError, match=rf"'.*a.npz' cannot be used: .*({why}|do not fit into)"):
        build(data=path)
    with pytest.raises(ValueError, match=rf"({why}|do not fit into)"):
        build(data=(np.ones(shape), y.astype(int)))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"images": np.full((1623, 1, 28, 28), np.nan, np.float32)}, "finite numbers from 0 to 255"),
        ({"images": np.full((1623, 1, 28, 28), 256.0, np.float32)}, "finite numbers from 0 to 255"),
        ({"images": np.zeros((1623, 1, 28, 28), np.int64)}, "images must be bytes"),
        ({"images": np.zeros((1623, 28, 28), np.uint8)}, "images must be bytes"),
        ({"bits": np.zeros((1623, 1, 98), np.float32)}, "bits must be bytes"),
        (
            {"bits": np.zeros((1623, 1, 98), np.uint8), "split_vinyals": np.zeros(1623)},
            "split_vinyals must be integers",
        ),
        ({"bits": np.zeros((1623, 1, 98), np.uint8), "class_names": np.zeros(1623)}, "class_names must be texts"),
    ],
)
def test_arrays_of_omniglot_have_their_dtype_shape_and_range(tmp_path: Path, content: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        omniglot(saved(tmp_path / "o.npz", **content))


def test_labels_are_finite() -> None:
    X, y = torch.ones(9, 2), torch.arange(9.0) % 2
    assert load((X, y), "", sizes=(5, 2), seed=0).classes == 2
    for wrong in (torch.inf, torch.nan):
        y[:] = torch.tensor([0.0, wrong, 1.0]).repeat(3)
        with pytest.raises(ValueError, match=r"labels that are integers. Got (inf|nan)"):
            load((X, y), "", sizes=(5, 2), seed=0)


# Checkpoints


def test_a_checkpoint_executes_nothing_and_no_advice_to_trust_it_is_passed_on(tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    instance = quadratic(p=2, q=2)
    arguments: Any = {"estimator": "aid-cg", "max_steps": 2, "checkpoint": file, "resume": True}
    torch.save({"format": 2, "x": Touch(tmp_path / "touched")}, file)
    for content in (file.read_bytes(), pickle.dumps(Touch(tmp_path / "touched")), b""):
        file.write_bytes(content)
        for read in (
            lambda: minimize(instance.problem, instance.x0, instance.y0, **arguments),
            lambda: read_best(file),
        ):
            with pytest.raises(ValueError, match=r"is not (a )?readable") as caught:
                read()
            assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "touched").exists()


def test_a_compressed_checkpoint_is_not_unpacked(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(500_000)}, tmp_path / "a.pt")
    assert checkpoints.load_plain(tmp_path / "a.pt")["x"].shape == (500_000,)
    with zipfile.ZipFile(tmp_path / "a.pt") as whole:
        content = {name: whole.read(name) for name in whole.namelist()}
    small = zipped(tmp_path / "b.pt", content)
    assert small.stat().st_size < 10_000
    with pytest.raises(ValueError, match="it is compressed"):
        checkpoints.load_plain(small)
    assert checkpoints.load_plain(zipped(tmp_path / "c.pt", content, zipfile.ZIP_STORED))["x"].shape == (500_000,)


def test_a_safetensors_file_executes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    (tmp_path / "a.safetensors").write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
    with pytest.raises(ValueError, match=r"`Estimate.load\(path\)`: .* is damaged"):
        Estimate.load(tmp_path / "a.safetensors")
    assert not (tmp_path / "touched").exists()


# The page


def test_the_page_states_the_limits_of_the_code() -> None:
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    mib = 1 << 20
    assert f"{images.BYTES // mib} MiB a file, {images.PIXELS // mib} Mi pixels an image" in text
    assert f"beyond {arrays.FREE // mib} MiB no more than {arrays.TIMES} times the file" in text
    assert f"{arrays.BYTES // (1024 * mib)} GiB of all arrays, 1 GiB for Omniglot" in text
    limits = f"{LIMITS.members:,} members, {LIMITS.member // mib} MiB a member, {LIMITS.total // mib} MiB together"
    assert limits in text and 'formats=("PNG", "JPEG")' in text and images.FORMATS == ("PNG", "JPEG")
    assert mib == archives.MIB and f"{data_command._MOST // mib} MiB |" in text


def test_files_are_opened_by_these_readers_only() -> None:
    """No other place of the library opens images, archives or arrays, or reads what torch has saved."""
    calls = (
        r"Image\.open\(|np\.load\(|numpy\.load\(|torch\.load\(|zipfile\.ZipFile\(|tarfile|pickle\.loads?\(|yaml|h5py"
    )
    found = set()
    for folder in ("bilevel", "solvers", "problems"):
        for path in (ROOT / folder).rglob("*.py"):
            code = re.sub(r'""".*?"""|#[^\n]*', "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
            found |= {path.relative_to(ROOT).as_posix()} if re.search(calls, code) else set()
    assert found == {f"bilevel/outside/{name}.py" for name in ("archives", "checkpoints", "images")}


def test_pixels_of_sixteen_bits_keep_their_order(tmp_path: Path) -> None:
    """Pillow cuts them off at 255, so that all are white."""
    for kind in ("one", "two"):
        (tmp_path / kind).mkdir()
        for level in (40, 100, 160):
            grey = np.full((4, 4), level * 257, dtype=np.uint16)
            Image.fromarray(grey).save(tmp_path / kind / f"{level}.png")
    found = image_folder(tmp_path, size=4).pixels(torch.tensor([0, 0, 0]), torch.tensor([0, 1, 2]))
    levels = found.reshape(3, -1)[:, 0].sort().values
    assert levels.tolist() == [40, 100, 160]


def test_a_checkpoint_whose_tensors_are_larger_than_it_is_refused(tmp_path: Path) -> None:
    torch.save({"y": torch.zeros(1).expand(10**12, 2)}, tmp_path / "large.pt")
    with pytest.raises(ValueError, match="larger than what is stored"):
        checkpoints.load_plain(tmp_path / "large.pt")
    torch.save({"y": torch.zeros(4)[1:3], "s": {1, 2}}, tmp_path / "part.pt")
    assert torch.equal(checkpoints.load_plain(tmp_path / "part.pt")["y"], torch.zeros(2))


def test_a_file_that_names_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    """Each mention would be a copy: more than the file holds."""
    safetensors: Any = pytest.importorskip("safetensors.torch")
    from bilevel.portable import tensor_file

    tensor_file.write_tensors(tmp_path / "once", "Estimate", {"a": torch.ones(3)})
    assert torch.equal(tensor_file.read_tensors(tmp_path / "once", "Estimate", "cpu")["a"], torch.ones(3))
    with safetensors.safe_open(tmp_path / "once", framework="pt") as opened:
        about = opened.metadata()
    twice = {**about, "content": about["content"].replace('{"$tensor": "a"}', '[{"$tensor": "a"}, {"$tensor": "a"}]')}
    assert twice != about
    safetensors.save_file({"a": torch.ones(3)}, tmp_path / "twice", twice)
    with pytest.raises(ValueError, match="names a tensor twice"):
        tensor_file.read_tensors(tmp_path / "twice", "Estimate", "cpu")

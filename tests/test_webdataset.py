"""WebDataset: the format's own grouping, a row for whatever is in a shard, and the truth about damaged ones."""

from __future__ import annotations

import io
import os
import tarfile
import tracemalloc
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

from cdclean.datasets.reading import contents
from cdclean.datasets.sample import Dataset, Sample
from cdclean.datasets.webdataset import IMAGE_FIELDS, _Keys, grouped, open_webdataset, samples, split
from cdclean.errors import DatasetError
from tests.tars import Part, member, png, shard, tar, write


def dataset(*shards: Path) -> Dataset:
    return Dataset(str(shards[0].parent), "webdataset", "x", tuple(str(shard) for shard in shards))


def rows(path: Path, *parts: Part) -> list[Sample]:
    found = list(samples(dataset(write(path / "0.tar", parts))))
    assert len({sample.key for sample in found}) == len(found)
    return found


def told(path: Path, *parts: Part) -> list[tuple[str, str | None, str | None]]:
    return [(sample.key, sample.class_name, sample.problem) for sample in rows(path, *parts)]


# --- the format ---


def test_members_of_one_key_are_a_sample(tmp_path: Path) -> None:
    parts = [
        ("a/1.jpg", b"one"),
        ("a/1.json", b"{}"),
        ("a/1.seg.png", b"mask"),
        ("a/2.c.PNG", b"two"),
        ("b/1.gif", b"3"),
    ]
    found = rows(tmp_path, *parts)
    assert [(sample.key, sample.class_name, sample.problem) for sample in found] == [
        ("a/1", "a", None),
        ("a/2", "a", None),
        ("b/1", "b", None),
    ]
    assert [read() for read in contents(found)] == [b"one", b"two", b"3"]
    assert {sample.url for sample in found} == {f"{tmp_path}/0.tar"}
    assert {sample.modified for sample in found} == {(tmp_path / "0.tar").stat().st_mtime}
    assert {sample.access for sample in found} == {"range"}


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a/b.c.jpg", ("a/b", "c.jpg")),
        ("a.b/c.jpg", ("a.b/c", "jpg")),
        ("./a.JPG", ("./a", "jpg")),
        ("a.", ("a", "")),
        ("a", None),
        ("a.b/c", None),
        (".a.jpg", None),
        ("a/.b.jpg", None),
        ("", None),
        ("a/", None),
    ],
)
def test_keys_and_fields(name: str, parts: tuple[str, str] | None) -> None:
    assert split(name) == parts


def test_the_image_among_several_does_not_depend_on_their_order(tmp_path: Path) -> None:
    fields = ["json", "b.jpg", "a.jpg", "a.png", *reversed(IMAGE_FIELDS)]
    expected = [*IMAGE_FIELDS, "a.jpg", "b.jpg", "a.png"]
    for ordered in (fields, fields[::-1]):
        left = list(ordered)
        for best in expected:
            found = rows(tmp_path, *((f"x.{name}", name.encode()) for name in left))
            assert [read() for read in contents(found)] == [best.encode()]
            left.remove(best)


def test_a_file_goes_before_a_link(tmp_path: Path) -> None:
    link = member("x.jpg", tarfile.SYMTYPE, "y.jpg")
    assert [read() for read in contents(rows(tmp_path, link, ("x.gif", b"gif")))] == [b"gif"]


@pytest.mark.parametrize(
    ("sidecars", "label"),
    [
        ({"cls": b"7\n", "json": b'{"label": 8}'}, "7"),
        ({"cls": b"007"}, "7"),
        ({"cls": b" tabby cat "}, "tabby cat"),
        ({"cls": b"\xff\xfe\0"}, "folder"),
        ({"cls": b"two\nlines"}, "folder"),
        ({"cls": b"x" * 300}, "folder"),
        ({"cls": b"x" * 5000, "json": b'{"label": 8}'}, "8"),
        ({"json": b'{"label": 8, "class": "cat"}', "txt": b"dog"}, "8"),
        ({"json": b'{"class": "cat"}'}, "cat"),
        ({"json": b'{"label": null, "category": "cat"}'}, "cat"),
        ({"json": b'{"label": true}'}, "folder"),
        ({"json": b'{"label": [1]}', "txt": b"dog"}, "folder"),
        ({"json": b'"cat"'}, "folder"),
        ({"json": b"[" * 100000}, "folder"),
        ({"json": b"1" * 5000}, "folder"),
        ({"json": b'{"label": "\\ud800"}'}, "?"),
        ({"json": b" " * 2**20 + b'{"label": 8}'}, "folder"),
        ({"txt": b"golden retriever\n"}, "golden retriever"),
        ({"txt": b"a photo of a dog"}, "folder"),
        ({"txt": b"one\ntwo"}, "folder"),
        ({}, "folder"),
    ],
)
def test_labels(tmp_path: Path, sidecars: dict[str, bytes], label: str) -> None:
    parts = [(f"top/folder/1.{name}", data) for name, data in sidecars.items()]
    for ordered in ([*parts, ("top/folder/1.jpg", b"x")], [("top/folder/1.jpg", b"x"), *reversed(parts)]):
        assert [sample.class_name for sample in rows(tmp_path, *ordered)] == [label]


def test_no_label(tmp_path: Path) -> None:
    assert [row[:2] for row in told(tmp_path, ("1.jpg", b"x"), ("./2.jpg", b"x"))] == [("1", None), ("./2", None)]


def test_entries_of_the_format_are_files_below_the_folder(tmp_path: Path) -> None:
    """What is passed over goes into copies as it stands, so that what leads elsewhere is not passed over."""
    outside = ("__meta__/../../owned", b"abc")
    parts = [member("__meta__", tarfile.SYMTYPE, "/etc"), member("__dev__", tarfile.CHRTYPE), outside, *shard(range(2))]
    parts += [("__meta__/info", b"{}"), member("../up", tarfile.DIRTYPE), member("folder", tarfile.DIRTYPE)]
    found = {sample.key: sample.problem for sample in rows(tmp_path, *parts)}
    assert {key for key, problem in found.items() if problem} == {
        "__meta__",
        "__dev__",
        "__meta__/../../owned",
        "../up",
    }


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_webdataset_library_yields_the_same(tmp_path: Path, layout: int) -> None:
    long = "deep/" * 15
    first = [*shard(range(30), "a/"), ("a/x.y.PNG", png(1)), (f"{long}1.jpg", b"jpg"), (f"{long}1.txt", b"text")]
    second = [member("b", tarfile.DIRTYPE), ("__index__", b"skipped"), ("__meta__/info.json", b"{}"), *shard(range(9))]
    second += [("./d.e/f.seg.png", png(2)), ("./d.e/f.json", b"{}"), ("README", b"no key")]
    paths = [write(tmp_path / f"{number}.tar", parts, layout) for number, parts in enumerate((first, second))]
    with ExitStack() as stack:
        streams = [{"url": str(path), "stream": stack.enter_context(path.open("rb"))} for path in paths]
        theirs = list(group_by_keys(tar_file_expander(streams)))
    ours = [sample for sample in samples(dataset(*paths)) if sample.problem is None]
    assert [sample.key for sample in ours] == [sample["__key__"] for sample in theirs]
    for sample, data in zip(theirs, contents(ours), strict=True):
        images = [value for name, value in sample.items() if name.rpartition(".")[2] in IMAGE_FIELDS]
        assert images == [data()]


# --- nothing vanishes ---


def test_what_is_no_image_has_a_row_and_a_reason(tmp_path: Path) -> None:
    no_key = "a name without a key: no dot, or one in front"
    sparse = member("sparse.jpg")
    sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    found = told(
        tmp_path,
        ("a.json", b"{}"),
        ("a.txt", b"cat"),
        ("b.", b""),
        ("README", b"text"),
        ("d/._1.jpg", b"finder"),
        member("link.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        member("hard.jpg", tarfile.LNKTYPE, "b.jpg"),
        member("device.jpg", tarfile.CHRTYPE),
        member("pipe.jpg", tarfile.FIFOTYPE),
        member("folder.jpg", tarfile.DIRTYPE),
        sparse,
        ("/top/1.jpg", b"x"),
        ("a/../../1.jpg", b"x"),
        ("../key", b"x"),
        ("empty.jpg", b""),
        member("pipe", tarfile.FIFOTYPE),
        ("__x__/1.jpg", b"an image"),
    )
    assert [(key, problem) for key, _, problem in found] == [
        ("a", "no image among its members: json, txt"),
        ("README", no_key),
        ("d/._1.jpg", no_key),
        ("b", "no image among its members: (nothing after the dot)"),
        ("link", "a link; links in a tar are not followed"),
        ("hard", "a link; links in a tar are not followed"),
        ("device", "a device, a named pipe or the like, not a file"),
        ("pipe", "a device, a named pipe or the like, not a file"),
        ("sparse", "a sparse file, stored without its holes; such are not read"),
        ("/top/1", "an absolute name; only names below a folder are read"),
        ("../key", "a name that leads out of its folder"),
        ("a/../../1", "a name that leads out of its folder"),
        ("pipe@0.tar:12288", "a device, a named pipe or the like, not a file"),
        ("empty", None),
        ("__x__/1", None),
    ]


def test_keys_that_come_again(tmp_path: Path) -> None:
    one = write(
        tmp_path / "0.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.json", b"{}"), ("a.jpg", b"3"), ("a.jpg", b"4")]
    )
    two = write(tmp_path / "1.tar", [("a.jpg", b"5"), ("a@1.tar:0.jpg", b"6"), ("", b"7")])
    (tmp_path / "again").mkdir()
    three = write(tmp_path / "again/1.tar", [("a.jpg", b"8")])
    found = list(samples(dataset(one, two, three)))
    keys = ["a", "b", "a@0.tar:2048", "a@0.tar:4096", "a@1.tar:0", "@1.tar:2048", "a@1", "a@1.tar:0'"]
    assert [sample.key for sample in found] == keys
    assert [read() for read in contents(found)] == [b"1", b"2", b"3", b"4", b"5", b"7", b"6", b"8"]


def test_names_that_are_not_text(tmp_path: Path) -> None:
    found = rows(tmp_path, (os.fsdecode(b"\xff/\xfe.jpg"), b"1"), ("a\\b.jpg", b"2"), ("x" * 5000 + ".jpg", b"3"))
    assert [sample.key for sample in found] == ["\\xff/\\xfe", "x" * 4096, "a\\\\b"]
    assert found[0].class_name == "\\xff"
    assert found[1].problem == "a name of 5004 characters; the limit is 4096"


def test_a_sample_of_too_many_members_is_several(tmp_path: Path) -> None:
    found = rows(tmp_path, *((f"a.{number}", b"") for number in range(2500)), ("b.jpg", b""))
    assert len(found) == 4
    assert all(sample.problem and sample.problem.endswith(", ...") for sample in found[:3])


def test_keys_are_kept_in_little_memory() -> None:
    keys = _Keys()
    tracemalloc.start()
    given = [keys.unique(f"{number // 2}", "s", number) != f"{number // 2}" for number in range(20_000)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert given == [False, True] * 10_000
    assert peak < 20_000 * 50


def test_grouped_gives_every_member_once(tmp_path: Path) -> None:
    parts = [*shard(range(5)), ("README", b"x"), ("z.json", b"{}"), ("z.jpg", b"x")]
    path = write(tmp_path / "0.tar", parts)
    data = path.read_bytes()
    names = []
    for sample, group in grouped(dataset(path)):
        for one in group:
            names.append(one.name)
            assert data[one.offset : one.offset + one.size] == dict(parts)[one.name]
        assert sample.offset in [one.offset for one in group]
    assert sorted(names) == sorted(name for name, _ in parts)


# --- damage ---


def test_every_cut_accounts_for_all_before_it(tmp_path: Path) -> None:
    parts = [*shard(range(20), "a/"), ("big.jpg", bytes(range(256)) * 20), ("big.json", b'{"label": 1}')]
    data = tar(parts)
    whole = list(samples(dataset(write(tmp_path / "whole.tar", parts))))
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = archive.getmembers()
    originals = dict(parts)
    path = tmp_path / "0.tar"
    end = members[-1].offset_data + 512
    for cut in range(0, len(data), 500):
        path.write_bytes(data[:cut])
        found = list(samples(dataset(path)))
        shard_row = found[-1] if cut < end + 512 else None
        if shard_row is not None:
            found.pop()
            assert shard_row.key == "0.tar/"
            assert shard_row.offset == cut
            assert f"damaged at byte {cut}," in str(shard_row.problem)
        begun = [one.name for one in members if one.offset_data <= cut]
        assert [sample.key for sample in found] == list(dict.fromkeys(name.partition(".")[0] for name in begun))
        for sample, expected, read in zip(found, whole, contents(found), strict=False):
            assert (sample.key, sample.offset, sample.size) == (expected.key, expected.offset, expected.size)
            if sample.offset + sample.size <= cut:
                assert sample.problem is None
                assert read() == originals[f"{sample.key}.{'png' if sample.key != 'big' else 'jpg'}"]
            else:
                assert sample.problem == f"cut off: {cut - sample.offset} of its {sample.size} bytes are there"


def test_half_a_label_is_no_label(tmp_path: Path) -> None:
    data = tar([("a.jpg", b"x"), ("a.cls", b"123")])
    (tmp_path / "0.tar").write_bytes(data[:1538])
    assert [sample.class_name for sample in samples(dataset(tmp_path / "0.tar"))] == [None, None]
    (tmp_path / "0.tar").write_bytes(data[:1539])
    assert [sample.class_name for sample in samples(dataset(tmp_path / "0.tar"))] == ["123", None]


def test_a_damaged_shard_does_not_touch_its_neighbours(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"{number}.tar", shard(range(number * 10, number * 10 + 3)))
    data = bytearray((tmp_path / "1.tar").read_bytes())
    data[2048] ^= 1  # the header of the second sample
    (tmp_path / "1.tar").write_bytes(data)
    (tmp_path / "3.tar").touch()
    os.mkfifo(tmp_path / "4.tar")
    (tmp_path / "5.tar").symlink_to("nowhere")
    write(tmp_path / "6.tar", [])
    opened = open_webdataset([str(tmp_path)])
    assert [(sample.key, sample.problem) for sample in samples(opened)] == [
        *((f"{number:06d}", None) for number in (0, 1, 2, 10)),
        ("1.tar/", "damaged at byte 2048, nothing is read from there on: no header of a member: bad checksum"),
        *((f"{number:06d}", None) for number in (20, 21, 22)),
        (
            "3.tar/",
            "damaged at byte 0, nothing is read from there on: the archive ends here, without its end-of-archive mark",
        ),
        ("4.tar/", "cannot be read: not a regular file"),
        ("5.tar/", "cannot be read: no such file or directory"),
    ]


def test_without_an_image_it_is_no_dataset(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", [("a.json", b"{}"), ("b.json", b"{}"), member("c.jpg", tarfile.SYMTYPE, "x")])
    with pytest.raises(
        DatasetError, match=r"no image that can be read .*: 2 x no image among its members: json; 1 x a link"
    ):
        open_webdataset([str(tmp_path)])
    write(tmp_path / "0.tar", [])
    with pytest.raises(DatasetError, match="no member"):
        open_webdataset([str(tmp_path)])


SEED = tar([*shard(range(3)), ("x/" * 60 + "1.jpg", b"x" * 600), ("a.json", b'{"label": 1}'), ("README", b"x")])


@given(st.data())
@settings(max_examples=150)
def test_whatever_the_bytes_rows_have_unique_keys(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    archive = bytearray(SEED)
    for _ in range(data.draw(st.integers(0, 8))):
        position = data.draw(st.integers(0, len(archive) - 1))
        archive[position] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):  # let the change pass the checksum
            block = position // 512 * 512
            archive[block + 148 : block + 156] = b" " * 8
            archive[block + 148 : block + 156] = b"%06o\0 " % sum(archive[block : block + 512])
    del archive[data.draw(st.integers(len(archive) // 2, len(archive))) :]
    path = tmp_path_factory.mktemp("fuzz") / "0.tar"
    path.write_bytes(archive)
    found = list(samples(dataset(path)))
    assert len({sample.key for sample in found}) == len(found)
    for sample, read in zip(found, contents(found), strict=True):
        sample.key.encode()
        if sample.problem is None:
            assert len(read()) == sample.size

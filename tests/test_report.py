"""The report: numbers of all samples, pictures of a few, names that cannot do harm, commands that can be pasted."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import zlib
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cdclean import options, report
from cdclean.config import DistillConfig, ModelSpec, paper, preset, to_dict
from cdclean.errors import IncompleteError, InputError, UsageError
from cdclean.records import load_run
from cdclean.report import commands, figures, gathering, rendering
from cdclean.schema import RECORDS
from cdclean.selection import select, write_decisions
from cdclean.storage import locate
from tests.runs import SIZE, contents, snapshot, write_run

ROOT = Path(__file__).parents[1]
PICTURES = ("thumbnail", "mask_thumbnail", "pattern_thumbnail")

# Names that would break out of an element, an attribute, a script, a line of CSV or the reading direction.
AWKWARD = [
    "cat/<img src=x onerror=alert(1)>.png",
    "cat/\"><script>alert('1')</script>.png",
    "cat/</script><svg onload=alert(1)>.png",
    "cat/javascript:alert(1).png",
    "cat/{{ 7 * 7 }}{% raw %}.png",
    'cat/a "quoted", name.png',
    "cat/two\nlines\r\nand\ta tab.png",
    "cat/\u202egnp.exe\u202c\u200b.png",
    "cat/not utf-8 \\xff\\\\.png",
    "cat/=1+1;&amp;&#10;'.png",
    "cat/__proto__",
    "</style><b>dog</b>/1.png",
]


def picture(seed: int, kind: str = "PNG", side: int = SIZE) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def dress(run: Path, columns: Mapping[str, Mapping[str, Any]] | None = None, pictures: bool = True) -> Path:
    """Give the samples of a run pictures of their own and other columns: column -> key -> value."""
    for part in sorted((run / "records").iterdir()):
        table = pq.read_table(part, schema=RECORDS)
        keys = table["key"].to_pylist()
        ok = [status == "ok" for status in table["status"].to_pylist()]
        values: dict[str, list[Any]] = {
            name: [column.get(key) for key in keys] for name, column in (columns or {}).items()
        }
        if pictures:
            drawn = [
                {name: {"bytes": picture(zlib.crc32(f"{key} {name}".encode())), "path": None} for name in PICTURES}
                for key in keys
            ]
            for name in PICTURES:
                values.setdefault(name, [row[name] if scored else None for row, scored in zip(drawn, ok, strict=True)])
        for name, column in values.items():
            index = RECORDS.get_field_index(name)
            table = table.set_column(index, RECORDS.field(index), pa.array(column, RECORDS.field(index).type))
        pq.write_table(table, part)
    return run


def backdoored_run(folder: Path, poisoned: int = 40, clean: int = 360) -> Path:
    """Three classes; the poisoned samples of class a have tiny masks and sure predictions."""
    rng = np.random.default_rng(0)
    norms = {f"a/p{index:03}.png": float(rng.uniform(1, 2)) for index in range(poisoned)}
    norms |= {f"{'abc'[index % 3]}/{index:03}.png": float(rng.uniform(10, 60)) for index in range(clean)}
    predictions = {key: "abc".index(key[0]) for key in norms}
    margins = {key: float(rng.uniform(12, 15) if norm < 5 else rng.uniform(2, 8)) for key, norm in norms.items()}
    confidences = dict.fromkeys(norms, 0.875)
    run = write_run(folder / "set.cdclean", norms, unreadable={"b/broken.png": "truncated file"}, parts=8)
    description = json.loads((run / "run.json").read_text())
    description["model"] |= {"classes": 3, "class_names": ["a", "b", "c"], "source": "net.pt"}
    (run / "run.json").write_text(json.dumps(description))
    return dress(run, {"prediction": predictions, "margin": margins, "confidence": confidences})


def grouped_run(folder: Path, masks: tuple[float, float] = (3, 12)) -> Path:
    """The same, with embeddings: the poisoned samples are seen apart, and their masks are not the smallest of all.

    With `masks` (10, 35) they are only somewhat smaller than most.
    """
    run, random = backdoored_run(folder), np.random.default_rng(0)
    keys = [key for key in load_keys(run) if "broken" not in key]
    poisoned = {key: float(random.uniform(*masks)) for key in keys if key.startswith("a/p")}
    vectors = {key: (random.normal(0, 1, 6) + 10 * (key in poisoned)).tolist() for key in keys}
    norms = {key: poisoned.get(key, float(random.uniform(10, 60))) for key in keys}
    return dress(run, {"embedding": vectors, "mask_norm": norms})


def awkward_run(folder: Path) -> Path:
    norms = {key: 1.0 + index for index, key in enumerate(AWKWARD)}
    return dress(write_run(folder / "it's <b>.cdclean", norms, unreadable={"owl/<i>.png": "</td><script>x</script>"}))


class Page(HTMLParser):
    """What a page is made of: (tag, attributes), and the text outside style and script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.raw: dict[str, str] = {}
        self.within = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.within = tag if tag in ("style", "script") else ""

    def handle_endtag(self, tag: str) -> None:
        self.within = ""

    def handle_data(self, data: str) -> None:
        if self.within:
            self.raw[self.within] = self.raw.get(self.within, "") + data
        else:
            self.text += data

    def values(self, name: str) -> list[str]:
        return [value for _, attributes in self.tags if (value := attributes.get(name)) is not None]


def page_of(run: Path, **arguments: Any) -> Page:
    return Page(report.write(run, **arguments).read_text())


def words_of(page: Page) -> str:
    return re.sub(r"\s+", " ", page.text)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return backdoored_run(tmp_path_factory.mktemp("report"))


# --- Writing ---


def test_the_page_appears_in_the_run_folder_and_nothing_else_changes(tmp_path: Path) -> None:
    run = backdoored_run(tmp_path)
    before = snapshot(run)
    assert report.write(run) == run / "report.html"
    after = snapshot(run)
    assert after.keys() - before.keys() == {"report.html"}
    assert {name: state for name, state in after.items() if name not in ("report.html", ".")} == {
        name: state for name, state in before.items() if name != "."
    }


def test_the_same_run_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    first, second = (report.write(run, tmp_path / name).read_bytes() for name in ("one.html", "two.html"))
    assert first == second


def test_a_run_and_a_page_in_remote_storage(run: Path, tmp_path: Path) -> None:
    remote = locate("memory://report-test/set.cdclean")
    for name, data in contents(run).items():
        place = remote / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    written = report.write(remote, locate("memory://report-test/page.html"))
    here = report.write(run, tmp_path / "page.html").read_text()
    assert written.read_bytes().decode().replace(str(remote), str(run)) == here


def test_what_cannot_be_written_about(tmp_path: Path) -> None:
    run = write_run(tmp_path / "x.cdclean", {"a/1.png": 1.0})
    for count in (-1, 501):
        with pytest.raises(UsageError, match="samples_shown"):
            report.write(run, samples_shown=count)
    (run / "_SUCCESS").unlink()
    with pytest.raises(IncompleteError):
        report.write(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("norms", "unreadable"),
    [
        ({}, {"a/1.png": "broken", "b/2.png": None}),
        ({"a/1.png": 3.0}, {}),
        ({f"a/{index}.png": 3.0 for index in range(50)}, {}),
        ({f"a/{index}.png": 0.0 for index in range(50)}, {}),
        ({f"{index}.png": 1.0 + index for index in range(50)}, {}),
    ],
    ids=["none scored", "one", "all the same", "all empty", "no classes"],
)
def test_runs_of_which_there_is_little_to_say(tmp_path: Path, norms: dict[str, float], unreadable: Any) -> None:
    page = page_of(write_run(tmp_path / "x.cdclean", norms, unreadable=unreadable))
    shown = {json.loads(key) for key in page.values("data-key")}
    assert shown <= norms.keys()
    assert len(shown) >= min(len(norms), 24)
    assert ("No sample has a score." in page.text) == (not norms)
    assert "NaN" not in page.text
    assert "Infinity" not in page.text


# --- What it says ---


def test_verdict_decision_and_next_step(tmp_path: Path) -> None:
    run = backdoored_run(tmp_path)
    before = words_of(page_of(run))
    assert "Looks like a backdoor" in before
    assert "nothing yet" in before
    place = shlex.quote(str(run))
    assert f"cdclean filter {place} --auto" in before
    assert "--overwrite" not in before
    write_decisions(run, select(run, quantile=0.25))
    after = words_of(page_of(run))
    assert "100 of 401 samples are dropped (among the smallest 25 %), 300 kept, 1 have no score" in after
    assert f"cdclean filter {place} --auto --overwrite" in after
    assert "decided cut-off" in after
    listed = tmp_path / "mine.csv"
    listed.write_text("key\na/p000.png\n")
    write_decisions(run, select(run, quantile=0.25, keep=listed))
    assert "Lists kept 1 that the rule would drop, and dropped 0" in words_of(page_of(run))


def test_decisions_of_another_dataset_are_not_believed(tmp_path: Path) -> None:
    run = backdoored_run(tmp_path)
    other = write_run(tmp_path / "other.cdclean", {"a/1.png": 1.0, "a/2.png": 2.0})
    write_decisions(other, select(other, quantile=0.5))
    (run / "decisions.parquet").write_bytes((other / "decisions.parquet").read_bytes())
    with pytest.raises(InputError, match=r"decisions\.parquet"):
        report.write(run)
    (run / "decisions.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"decisions\.parquet"):
        report.write(run)


def test_samples_without_a_score_are_listed_up_to_a_limit(tmp_path: Path) -> None:
    errors = {f"a/{index:04}.png": f"reason {index}" for index in range(150)}
    words = words_of(page_of(write_run(tmp_path / "x.cdclean", {"a/ok.png": 1.0}, unreadable=errors)))
    assert "150 of 151 samples could not be scored (150 unreadable)" in words
    assert "50 more are not shown" in words
    assert len(re.findall(r"reason \d", words)) == gathering.FAILURES
    assert "reason 0" in words


def test_every_setting_is_there(run: Path) -> None:
    words = words_of(page_of(run))
    for value in ("net.pt", "imagefolder", "geometry.height", "0.5, 0.5, 0.5", "batch_size", "a, b, c"):
        assert value in words


def test_low_agreement_is_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "x.cdclean", {"a/1.png": 1.0, "b/1.png": 2.0})
    assert "Read this with care" not in words_of(page_of(run))
    for agreement in (0.31, 0.0):
        summary = json.loads((run / "summary.json").read_text()) | {"agreement": agreement}
        (run / "summary.json").write_text(json.dumps(summary))
        assert f"agree with the labels on {agreement:.0%}".replace("%", "\u00a0%") in page_of(run).text


def test_attributes_have_a_table(run: Path, tmp_path: Path) -> None:
    table = tmp_path / "attributes.csv"
    keys = load_keys(run)
    table.write_text("key,<b>mark\n" + "".join(f"{key},{'yes' if key[2] == 'p' else 'no'}\n" for key in keys))
    page = page_of(run, out=tmp_path / "with.html", attributes=table)
    assert "<b>mark = yes is over-represented most" in page.text
    assert page.values("data-value").count("Infinity") == 6  # three classes are described, by label and prediction
    assert page.values("data-value").count("not tested") == 6
    assert "#bias" in page.values("href")
    assert f"--attributes {table}" in page.text
    assert "#bias" not in page_of(run, out=tmp_path / "without.html").values("href")


def load_keys(run: Path) -> list[str]:
    return [key for key in pq.read_table(run / "manifest.parquet")["key"].to_pylist() if key]


# --- Which samples are shown ---


def test_galleries_hold_what_they_say(run: Path) -> None:
    samples = gathering.read_samples(run, load_run(run))
    density = samples.density
    smallest = gathering.smallest(samples, 10)
    assert sorted(density[samples.scored])[:10] == density[smallest].tolist()
    cutoff = sorted(density[samples.scored])[39]  # what lies on it is below it
    near = density[gathering.around(samples, cutoff, 10)]
    assert (near[:5] <= cutoff).all()
    assert (near[5:] > cutoff).all()
    assert near.tolist() == sorted(density[samples.scored])[35:45]
    drawn = gathering.random(samples, 50)
    assert len(set(drawn.tolist())) == 50
    assert samples.scored[drawn].all()
    assert drawn.tolist() == gathering.random(samples, 50).tolist()
    assert density[drawn].mean() > density[smallest].max()
    assert len(gathering.around(samples, 0.0, 10)) == 5
    assert len(gathering.around(samples, 1.0, 10)) == 5


def test_the_picture_beside_a_name_is_that_samples_own(run: Path) -> None:
    stored = {}
    for part in (run / "records").iterdir():
        for row in pq.read_table(part, columns=["key", *PICTURES]).to_pylist():
            if row["thumbnail"]:
                stored[row["key"]] = [row[name]["bytes"] for name in PICTURES]
    page = page_of(run)
    keys = [json.loads(value) for value in page.values("data-key")]
    urls = [value for tag, attributes in page.tags if tag == "img" and (value := attributes["src"])]
    assert len(urls) == 3 * len(keys) > 0
    data = [base64.b64decode(url.removeprefix("data:image/png;base64,")) for url in urls]
    for index, key in enumerate(keys):
        assert data[3 * index : 3 * index + 3] == stored[key]
    assert len(set(keys)) == int(re.findall(r"pictures are of (\d+) of them", words_of(page))[0])


def test_a_run_without_pictures_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "x.cdclean", {"a/1.png": 1.0, "a/2.png": 2.0})
    page = page_of(run)
    assert "--thumbnail-size 0" in page.text
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert len(page.values("data-key")) == 4


def test_only_images_become_pictures(tmp_path: Path) -> None:
    kinds = {
        "a/png": (picture(1), "png"),
        "a/jpeg": (picture(2, "JPEG"), "jpeg"),
        "a/webp": (picture(3, "WEBP"), "webp"),
        "a/svg": (b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", None),
        "a/html": (b"<script>alert(1)</script>", None),
        "a/empty": (b"", None),
    }
    run = write_run(tmp_path / "x.cdclean", {key: 1.0 + index for index, key in enumerate(kinds)})
    column = {key: {"bytes": data, "path": "http://example.com/x.png"} for key, (data, _) in kinds.items()}
    page = page_of(dress(run, dict.fromkeys(PICTURES, column), pictures=False))
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    found = {source.split(";")[0].removeprefix("data:image/") for source in sources}
    assert found == {kind for _, kind in kinds.values() if kind}
    assert "no picture was stored" in page.text


def test_large_pictures_shorten_the_gallery_not_the_truth(tmp_path: Path) -> None:
    norms = {f"a/{index:02}": 1.0 + index for index in range(24)}
    large = {key: {"bytes": picture(index, side=200), "path": None} for index, key in enumerate(norms)}
    assert 24 * 3 * min(len(value["bytes"]) for value in large.values()) > 3 * gathering.PICTURES
    run = dress(write_run(tmp_path / "x.cdclean", norms), dict.fromkeys(PICTURES, large), pictures=False)
    page = page_of(run)
    assert (run / "report.html").stat().st_size < 4e6
    words = words_of(page)
    shown = len(page.values("data-key")) // 2
    assert 0 < shown < 24
    assert f"The {shown} images of which the model needs least" in words


def test_no_torch_and_no_picture_that_is_not_shown(tmp_path: Path) -> None:
    """40 parts with 24 MB of pictures: only those that hold a shown sample are read, one after the other."""
    norms = {f"a/{index:04}.png": 1.0 + index / 100 for index in range(2000)}
    run = write_run(tmp_path / "x.cdclean", norms, parts=40)
    noise = picture(1, side=36)
    column = {key: {"bytes": noise, "path": None} for key in norms}
    dress(run, dict.fromkeys(PICTURES, column), pictures=False)
    code = (
        "import sys, pathlib, pyarrow\nfrom cdclean import report\n"
        "page = report.write(pathlib.Path(sys.argv[1]), samples_shown=8)\n"
        "assert not {'torch', 'torchvision', 'timm'} & sys.modules.keys()\n"
        "print(pyarrow.default_memory_pool().max_memory(), page.stat().st_size)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(run)], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    memory, size = map(int, done.stdout.split())
    assert memory < 3 * len(noise) * 2000 / 4
    assert size < 1e6


# --- Names that cannot do harm ---


def test_no_name_becomes_markup(tmp_path: Path) -> None:
    run = awkward_run(tmp_path)
    page = page_of(run)
    known = page_of(dress(write_run(tmp_path / "plain.cdclean", {f"a/{i}": 1.0 + i for i in range(len(AWKWARD))})))
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in known.tags}
    assert [tag for tag, _ in page.tags].count("script") == 1
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        assert (attributes.get("href") or "#").startswith(("#", "data:,"))
        assert (attributes.get("src") or "data:image/").startswith("data:image/")
    assert set(AWKWARD) == {json.loads(value) for value in page.values("data-key")}
    for name in AWKWARD:
        assert rendering.visible(name) in page.text
    assert "</td><script>x</script>" in page.text
    assert not re.search("[\u200b\u202c\u202e\x00-\x09\x0b-\x1f]", page.text)


def test_the_policy_names_the_one_style_and_the_one_script(run: Path) -> None:
    page = page_of(run)
    (policy,) = [
        attributes["content"] or ""
        for tag, attributes in page.tags
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    for name in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.raw[name].encode()).digest()).decode()
        assert rules[f"{name}-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    assert "unsafe" not in policy
    text = (run / "report.html").read_text()
    assert not re.search(r"https?://(?!www\.w3\.org)", text)


def test_visible_hides_nothing() -> None:
    assert rendering.visible("caf\u00e9/猫.png") == "caf\u00e9/猫.png"
    assert rendering.visible("a\nb\u202ec\x1b[0m") == "a\\nb\\u202ec\\u001b[0m"


# --- Numbers ---


@given(
    values=st.lists(st.floats(0, 1, allow_nan=False, allow_subnormal=False), max_size=200),
    below=st.none() | st.floats(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_a_histogram_counts_every_sample_once(values: list[float], below: float | None) -> None:
    density = np.array(values, dtype=float)
    marked = np.arange(len(density)) % 3 == 0
    counts = figures.histogram(density, marked, below=below)
    if counts is None:
        assert not (density <= (1 if below is None else below)).any()
        return
    assert (np.diff(counts.edges) > 0).all()
    assert counts.rest.sum() + counts.marked.sum() + counts.above == len(density)
    drawn = density <= (1 if below is None else below)
    assert counts.marked.sum() == (drawn & marked).sum()
    for width in (340.0, 560.0):
        chart = figures.draw(counts, [figures.CutOff(float(counts.edges[3]), "here", "by-verdict")], width)
        assert len(chart.lines) == 1
        for bar in chart.bars:
            assert chart.left - 0.1 <= bar.x <= bar.x + bar.width <= chart.right + 1
            assert chart.top - 0.2 <= bar.rest[0] <= bar.marked[0] <= chart.bottom + 0.2
            assert min(*bar.rest, *bar.marked) >= 0
        places = [tick.at for tick in chart.across]
        assert places == sorted(places)


@given(st.floats(0, 1))
def test_a_share_is_never_rounded_to_nothing_or_all(share: float) -> None:
    text = figures.percent(share)
    assert (text == "0\u00a0%") == (share == 0)
    assert (text == "100\u00a0%") == (share == 1)
    assert "e" not in text


def test_class_tables_agree_with_counting_by_hand(run: Path) -> None:
    samples = gathering.read_samples(run, load_run(run))
    names = samples.table["class_name"].combine_chunks()
    marked = samples.scored & (samples.density < 3 / SIZE**2)
    table = gathering.class_table(samples, names, marked)
    assert table is not None
    assert (table.smallest, table.marked, table.more) == (20, 40, 0)
    rows = {row.name: row for row in table.rows}
    assert table.rows[0].name == "a"
    assert {name: row.count for name, row in rows.items()} == {"a": 160, "b": 120, "c": 120}
    assert (rows["a"].smallest.count, rows["a"].smallest.ratio) == (20, pytest.approx(400 / 160))
    assert rows["a"].marked == gathering.Share(40, 1.0, pytest.approx(2.5))
    assert rows["b"].marked == gathering.Share(0, 0.0, 0.0)
    assert gathering.class_table(samples, pa.nulls(len(names), pa.string()), marked) is None


def test_many_classes_are_cut_and_said(tmp_path: Path) -> None:
    norms = {f"c{index:04}/1.png": 1.0 + index / 100 for index in range(gathering.CLASSES + 7)}
    words = words_of(page_of(write_run(tmp_path / "x.cdclean", norms)))
    assert "7 more classes are not shown" in words


# --- Commands ---


def test_words_survive_a_shell() -> None:
    names = [
        "plain",
        "a b",
        "it's",
        '"',
        "$HOME `x` \\",
        "-rf",
        "new\nline",
        "caf\u00e9",
        "\udcff\udc80x",
        "~",
        "*",
        "\x1b",
    ]
    line = "printf '%s\\0' " + " ".join(commands.word(name) for name in names)
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
    found = [os.fsdecode(name) for name in done.stdout.split(b"\0")[:-1]]
    assert found == [f"./{name}" if name.startswith("-") else name for name in names]


@pytest.mark.parametrize(
    "distill",
    [
        DistillConfig(),
        DistillConfig(steps=60, seed=7, precision="fp32", batch_size=16, area_cost=2.5),
        DistillConfig("logits"),
        DistillConfig("features", layer="layer4", learning_rate=0.05),
        paper("logits"),
        paper("features"),
        preset("fast"),
        preset("thorough", seed=3),
    ],
    ids=["default", "changed", "logits", "features", "paper", "paper features", "fast", "thorough"],
)
def test_the_scan_command_means_the_settings_of_the_run(distill: DistillConfig, tmp_path: Path) -> None:
    from cdclean.cli import app

    model = ModelSpec("my net.pt", "timm:resnet18", (32, 64), (0.1, 0.2, 0.3), (1.0, 0.5, 0.25), 0.875, "squash", True)
    content = {
        "dataset": {"location": str(tmp_path / "a set")},
        "model": {"source": model.source},
        "config": {
            "dataset": {"include": ["cat/*", "dog/*"], "exclude": [], "limit": 9},
            "model": to_dict(model),
            "distill": to_dict(distill),
            "thumbnail_size": 0,
        },
    }
    program, verb, *arguments = shlex.split(commands.scan(content, tmp_path / "x.cdclean"))
    assert (program, verb) == ("cdclean", "scan")
    group: Any = typer.main.get_command(app)
    scan = group.get_command(None, "scan")
    given = scan.make_context("scan", arguments).params
    assert options.model_spec(given) == model
    assert options.distill_config(given) == distill
    assert commands.without_option(content) == []
    assert (given["thumbnail_size"], list(given["include"]), given["limit"]) == (0, ["cat/*", "dog/*"], 9)
    assert str(given["out"]) == str(tmp_path / "x.cdclean")
    assert str(tmp_path / "a set") in str(given["dataset" if "dataset" in given else "datasets"])


def test_the_scan_command_names_no_option_that_there_is_not(tmp_path: Path) -> None:
    content: dict[str, Any] = {"dataset": {"location": "set"}, "model": {"source": "net.pt"}}
    from_python = DistillConfig(grid=8, averaged=0.5, colours="random", temperature=2.0, smoothness=1.0)
    content["config"] = {"distill": to_dict(from_python)}
    assert commands.scan(content, tmp_path) == f"cdclean scan set --model net.pt --out {tmp_path}"
    said = ["smoothness 1.0", "grid 8", "averaged 0.5", "colours random", "temperature 2.0"]
    assert commands.without_option(content) == said


def test_a_command_that_would_not_give_these_scores_says_so(tmp_path: Path) -> None:
    run = backdoored_run(tmp_path)
    assert "does not give these scores" not in words_of(page_of(run))
    content = json.loads((run / "run.json").read_text())
    content["config"]["distill"] = to_dict(DistillConfig(grid=8))
    (run / "run.json").write_text(json.dumps(content))
    assert "settings that have no option: grid 8." in words_of(page_of(run))


def test_an_unclear_verdict_does_not_send_the_reader_into_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = backdoored_run(tmp_path)
    verdict = report.judge(run)
    unclear = type(verdict)("unclear", "It is unclear.", verdict.suspects & False, None, (), {})
    monkeypatch.setattr(report, "judge", lambda _: unclear)
    words = words_of(page_of(run))
    assert "It is unclear." in words
    assert "--quantile 0 --drop set-drop.csv" in words.replace("dataset", "set")
    assert "--auto" not in words

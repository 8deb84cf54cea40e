"""The HTML page: it holds the net's own numbers, asks no server, and shows what it holds, also of hostile strings."""

import copy
import json
import re
import shutil
from functools import cache
from html.parser import HTMLParser
from importlib.resources import files

import architectures
import pytest
from command_line import output, refusal
from helpers import PLAN, make_batches, make_net
from image_folders import write_images

import stratavit
from stratavit import ArtifactError, Setting, StrataViTError, write_report
from stratavit.cli.parser import main
from stratavit.dropout_list.strata import Strata
from stratavit.evaluation.curve_points import Point, with_before, write_csv
from stratavit.reports.curve import curve
from stratavit.reports.html import SCRIPTS

BATCHES = make_batches()
FAST = ["--batch-size", "6", "--workers", "0"]
QUICK = Setting(seconds=0.001)
HOSTILE = (
    "</script><script>window.owned = 1</script><img src=x onerror='window.owned = 1'>\"'&amp;<!-- \u2028\u2029 \ud800"
)
LONG = "unbroken" * 40
SWIN = "swin_tiny_patch4_window7_224"


@pytest.fixture(scope="module", params=["paper", "short", SWIN, "eva02_base_patch14_224"])
def any_net(request):
    return net_of(request.param)


@cache
def net_of(name):
    """Nets of both methods, with a list that ends early, of stages, with modules left uncut."""
    if name == "merging":
        return copy.deepcopy(make_net("plain")).stratify(BATCHES, plan=PLAN, axes=("width", "tokens")).eval()
    if name == "paper":
        return make_net("plain", "paper", stratified=True)
    if name == "short":
        net = copy.deepcopy(make_net("plain", stratified=True))
        net.strata = Strata(net.sites, net.strata.entries[:20])
        return net
    return stratavit.SuperNet(architectures.make(name)).contract(BATCHES).stratify(BATCHES, plan=PLAN).eval()


def test_the_list_over_both_axes_is_shown(tmp_path):
    net = net_of("merging")
    found = curve(net, BATCHES, ("1", "0.6"))
    for points, axes in (((), "both"), (found, "both"), (found[:2], "width")):
        data = data_of(
            write_report(
                net, tmp_path / f"{axes}{len(points)}.html", points, latency=(points and QUICK) or None
            ).read_text()
        )
        assert data["list"] == axes
        assert ("--axes both" in data["extract"]) == (axes == "both")
        assert any(kind == "tokens" for _, kind, *_ in data["sites"]) == (axes == "both")
        strata = net.joint_strata if axes == "both" else net.strata
        widths = dict(net.resolve(None))
        for position, (site, width) in enumerate(data["entries"], 1):
            widths[data["sites"][site][0]] = width
            assert data["macs"][position] == net.macs(strata.spec(position)) == net.macs(widths)
        for row, point in zip(data["points"], points, strict=True):
            spec = net.spec(macs=float(point.asked), axes=point.axes)
            assert net.macs(
                {"width": net.strata, "both": net.joint_strata}[row["axes"]].spec(row["position"])
            ) == net.macs(spec)


def hostile_net():
    net = copy.deepcopy(make_net("plain", stratified=True))
    net.provenance = {"source": {"model": HOSTILE, LONG: LONG}, HOSTILE: [HOSTILE] * 2, LONG: {HOSTILE: None}}
    net.data_config = net.data_config | {"note": HOSTILE}
    return net


def data_of(page):
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found)


# ---- what the page holds --------------------------------------------------------------------------------


def test_every_position_is_the_nets(any_net, tmp_path):
    data = data_of(write_report(any_net, tmp_path / "page.html").read_text())
    assert len(data["macs"]) == len(data["params"]) == len(any_net.strata) + 1
    widths = {name: steps[-1] for name, _, steps, _ in data["sites"]}
    for position, (site, width) in enumerate([(0, data["sites"][0][2][-1]), *data["entries"]]):
        widths[data["sites"][site][0]] = width
        assert widths == any_net.spec(position=position)
        assert (data["macs"][position], data["params"][position]) == (any_net.macs(widths), any_net.params(widths))
    assert data["stops"] == (any_net.strata.group_ends() if any_net.method == "paper" else None)
    assert [site[:2] for site in data["sites"]] == [[site.name, site.kind] for site in any_net.sites]
    assert data["whole"] == any_net.uncut
    assert data["points"] == []


def test_points_facts_and_latency(net, points, tmp_path):
    odd = Point(**vars(points[0]) | {"loss": float("nan"), "top5": float("inf")})
    shown, page = [*points, odd], tmp_path / "page.html"
    data = data_of(write_report(net, page, shown, title="{{data}} {{script}}", latency=QUICK, run="a b").read_text())
    for row, point in zip(data["points"][:-1], points, strict=True):
        assert {key: row[key] for key in vars(point)} == vars(point)
        assert net.macs(net.spec(position=row["position"])) == point.macs
    last = data["points"][-1]
    assert (last["loss"], last["top5"], last["top1"]) == (None, None, points[0].top1)  # JSON has no NaN
    assert data["facts"]["provenance: contract"] == net.provenance["contract"]
    assert data["facts"]["versions"]["stratavit"] == stratavit.__version__
    assert data["extract"] == "stratavit extract 'a b'"
    assert data["title"] == "{{data}} {{script}}"  # places in the data are not filled
    assert all(point["ms"] > 0 for point in data["points"])
    assert "batch 1, eager, float32, cpu" in data["latency"]


class Parsed(HTMLParser):
    """Elements of a page, and addresses in their attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]


def test_the_page_names_no_address_and_is_the_same_twice(net, points, tmp_path):
    text = write_report(net, tmp_path / "page.html", points).read_text()
    assert text == write_report(net, tmp_path / "again.html", points).read_text()
    assert Parsed(text).addresses == ["data:,"]
    assert "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:" in text
    assert [one for one in re.findall(r"\w+://[^\s\"')]+", text) if "www.w3.org/2000/svg" not in one] == []
    assert "url(" not in text
    assert "@import" not in text
    folder = files("stratavit").joinpath("reports", "page")
    assert {part.name for part in folder.iterdir()} == {"page.html", "page.css", *SCRIPTS}


def test_hostile_strings_stay_strings(net, points, tmp_path):
    odd = [Point(**vars(points[0]) | {"asked": HOSTILE})]
    text = write_report(hostile_net(), tmp_path / "page.html", odd, HOSTILE, run=HOSTILE).read_text(encoding="utf-8")
    plain = write_report(net, tmp_path / "plain.html", points).read_text()
    assert Parsed(text).tags == Parsed(plain).tags
    embedded = re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)[0]
    assert not set("<>&\u2028\u2029") & set(embedded)
    assert data_of(text)["facts"]["provenance: source"]["model"] == HOSTILE
    assert data_of(text)["points"][0]["asked"] == HOSTILE


# ---- what is refused ------------------------------------------------------------------------------------


def test_what_is_refused(net, points, tmp_path):
    odd, unknown = copy.deepcopy(net), copy.deepcopy(net)
    odd.provenance, unknown.provenance = {"odd": {1: {2}}}, {"odd": float("nan")}
    (tmp_path / "page.html").touch()
    for error, words, one, options in (
        (ArtifactError, r"page\.html exists", net, {"overwrite": False}),
        (StrataViTError, "stratify", make_net("plain"), {}),
        (StrataViTError, "not of this", net, {"points": [Point(**vars(points[0]) | {"macs": points[0].macs + 1})]}),
        (StrataViTError, "points", net, {"latency": QUICK}),
        (ArtifactError, "JSON", odd, {}),
        (ArtifactError, "JSON", unknown, {}),
    ):
        with pytest.raises(error, match=words):
            write_report(one, tmp_path / "page.html", **{"overwrite": True} | options)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b""]


# ---- the command ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(net, points, tmp_path_factory):
    """A saved net, its curve and images."""
    folder = tmp_path_factory.mktemp("report")
    net.save(folder / "run")
    (folder / "curve").mkdir()
    write_csv(points, folder / "curve" / "curve.csv")
    write_images(folder / "data", side=32)
    return folder


def test_command_without_accuracy(work, capsys):
    assert main(["report", f"{work / 'run'}/"]) == 0
    assert "--data DIR adds accuracy" in capsys.readouterr().out
    page = work / "run-report.html"
    sizes = len(data_of(page.read_text())["macs"])
    found = output(capsys, "report", work / "run", "--overwrite")
    assert found == {"file": str(page), "bytes": page.stat().st_size, "sizes": sizes, "points": 0}


def test_command_counts_the_sizes_of_the_list_that_is_shown(tmp_path, capsys):
    net = net_of("merging")
    net.save(tmp_path / "run")
    found = output(capsys, "report", tmp_path / "run")
    assert (
        found["sizes"] == len(net.joint_strata) + 1 == len(data_of((tmp_path / "run-report.html").read_text())["macs"])
    )


def test_command_finds_the_curve_beside_the_run(work, points, tmp_path, capsys):
    shutil.copytree(work / "run", tmp_path / "run")
    shutil.copytree(work / "curve", tmp_path / "run-curve")
    assert output(capsys, "report", tmp_path / "run")["points"] == len(points)
    assert [point["top1"] for point in data_of((tmp_path / "run-report.html").read_text())["points"]] == [
        point.top1 for point in points
    ]


def test_command_measures_as_curve_does(work, tmp_path, capsys):
    options = ["--data", work / "data", "--shares", "1,0.6", *FAST]
    expected = output(capsys, "curve", work / "run", "--out", tmp_path / "curve", *options)["points"]
    output(capsys, "report", work / "run", "--out", tmp_path / "a.html", "--latency", "--threads", 1, *options)
    output(capsys, "report", work / "run", "--out", tmp_path / "b.html", "--curve", tmp_path / "curve")
    for page, timed in (("a.html", True), ("b.html", False)):
        found = data_of((tmp_path / page).read_text())["points"]
        assert [{key: point[key] for key in expected[0]} for point in found] == expected
        assert all((point["ms"] or 0) > 0 for point in found) == timed


def test_command_on_a_net_without_a_head(work, tmp_path, capsys):
    net_of("vit_small_patch16_dinov3").save(tmp_path / "run")
    options = [tmp_path / "run", "--data", work / "data", "--shares", "1", *FAST, "--out", tmp_path / "page.html"]
    assert "--knn" in refusal(capsys, "report", *options)
    assert output(capsys, "report", *options, "--knn", 3)["points"] == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--curve", "."], "holds no curve.csv; make one with `stratavit curve`"),
        (["--curve", "curve", "--data", "data"], "give one of them"),
        (["--knn"], "give --data"),
        (["--latency"], "give --curve or --data"),
        (["--out", "data"], "is a folder"),
        (["--out", "curve/curve.csv"], "--overwrite"),
    ],
)
def test_bad_commands(work, capsys, monkeypatch, options, expected):
    monkeypatch.chdir(work)
    before = sorted(work.iterdir())
    out = [] if "--out" in options else ["--out", "x.html"]
    assert expected in refusal(capsys, "report", "run", *out, *options)
    assert sorted(work.iterdir()) == before


# ---- in a browser ---------------------------------------------------------------------------------------


@pytest.fixture
def look(browser, tmp_path):
    """Opens a report; afterwards there must have been no error, no message, no dialog and no request."""
    opened = []

    def open_page(net, points=(), width=1000, scheme="light", **options):
        file = write_report(net, tmp_path / f"{len(opened)}.html", points, **options)
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page = context.new_page()
        seen = []
        for event in ("console", "pageerror", "dialog", "request"):
            page.on(event, lambda what, event=event: seen.append((event, getattr(what, "url", str(what)))))
        page.goto(file.as_uri())
        opened.append((context, file, seen))
        return page

    yield open_page
    for context, file, seen in opened:
        context.close()
        assert [what for what in seen if what[0] != "request" or not what[1].startswith("data:")] == [
            ("request", file.as_uri())
        ]


def texts(page):
    """The numbers that the page shows."""
    number = {name: int(page.text_content(f"#{name}").replace(",", "")) for name in ("position", "macs", "params")}
    kept = page.eval_on_selector_all("[data-site]", "all => all.map(e => [e.dataset.site, e.textContent])")
    return number, {name: tuple(map(int, text.split(" of "))) for name, text in kept}


def check(page, net, position):
    number, kept = texts(page)
    spec = net.spec(position=position)
    assert number == {"position": position, "macs": net.macs(spec), "params": net.params(spec)}
    assert kept == {site.name: (spec[site.name], site.width) for site in net.sites}
    assert f"--position {position} " in page.text_content("#command")
    share = f"{100 * net.macs(spec) / net.macs():.1f} % of the MACs"
    assert page.get_attribute("#slider", "aria-valuetext").startswith(share)


def move(page, value):
    page.eval_on_selector(
        "#slider", "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", value
    )


@pytest.mark.browser
def test_the_slider_agrees_with_python(any_net, look):
    page = look(any_net)
    stops = any_net.strata.group_ends() if any_net.method == "paper" else range(len(any_net.strata) + 1)
    last = len(stops) - 1
    assert int(page.get_attribute("#slider", "max")) == last
    for index in (0, last // 3, last // 2, last):
        move(page, last - index)
        check(page, any_net, stops[index])


@pytest.mark.browser
def test_all_works_by_keyboard(net, points, look):
    page = look(net, points)
    assert page.locator("input[value=ms]").count() == 0
    start = texts(page)[0]["position"]
    assert start == net.budget(macs=0.5).position
    page.focus("#slider")
    keys = (("ArrowRight", start - 1), ("ArrowLeft", start), ("Home", len(net.strata)), ("End", 0))
    for key, position in keys:
        page.keyboard.press(key)
        check(page, net, position)
    page.focus(f".point[data-position='{net.budget(macs=0.75).position}']")
    page.wait_for_selector("#tip", state="visible")
    page.keyboard.press("Enter")
    check(page, net, net.budget(macs=0.75).position)
    page.focus("#heat")
    for key, expected in (("ArrowDown", 0), ("ArrowDown", 1), ("ArrowRight", 1), ("ArrowUp", 0)):
        page.keyboard.press(key)
        assert page.text_content("#heat-status").startswith(f"{net.sites[expected].name}, unit ")


@pytest.mark.browser
def test_accuracy_is_told_where_the_eye_falls(net, points, look):
    """In the headline and in the slider's line, with the error that so few images leave; provenance is folded away."""
    known = [Point(**vars(p) | {"top1": top1, "n": 100}) for p, top1 in zip(points, (80.0, 79.0, 60.0), strict=True)]
    page = look(net, known)
    assert page.text_content("#headline") == "Top-1 79.0 % at 75 % of the MACs; 80.0 % at 100 %."
    assert "top-1 60.0 %" in page.text_content("#strip-text")
    assert "80.00 % ± 4.0" in page.get_attribute(".point", "aria-label")
    lengths = page.eval_on_selector_all(".error", "all => all.map(e => e.y1.baseVal.value - e.y2.baseVal.value)")
    assert lengths[0] < lengths[1] < lengths[2]
    assert page.is_hidden("#facts")
    page.click("#facts-more summary")
    assert page.is_visible("#facts")
    assert look(net).is_hidden("#headline")


@pytest.mark.browser
def test_the_line_before_recovery(net, points, look):
    known = with_before(points, [Point(**vars(p) | {"top1": 12.5}) for p in points[:2]])
    page = look(net, known)
    line = page.eval_on_selector(".curve.before", "line => [...line.points].map((p) => p.y)")
    assert len(line) == 2
    assert line[0] == line[1]
    assert "before 12.50 %" in page.get_attribute(".point", "aria-label")
    assert page.locator("th", has_text="before").count() == 1
    assert look(net, points).locator(".curve.before").count() == 0


@pytest.mark.browser
def test_the_page_of_both_axes(look):
    net = net_of("merging")
    page = look(net, curve(net, BATCHES, ("1", "0.6")))
    assert page.locator(".point").count() == 4
    assert page.locator(".point[data-position]").count() == 2
    assert page.locator(".tokens-only").first.is_visible()
    for share in ("60", "100"):
        page.fill("#share", share)
        spec = net.spec(macs=f"{share}%", axes="both")
        number, kept = texts(page)
        assert number["macs"] == net.macs(spec)
        assert {name: width for name, (width, _) in kept.items()} == {name: spec.get(name, 16) for name in kept}
        assert any(name.endswith(".tokens") for name in kept)
    page.focus(".point.other")
    page.wait_for_selector("#tip", state="visible")
    assert "width" in page.text_content("#tip")
    assert not look(net_of("short")).locator(".tokens-only").first.is_visible()


@pytest.mark.browser
def test_a_share_is_a_budget(net, look):
    page = look(net)
    for percent in ("77.7", "50", "33.3", "100"):
        page.fill("#share", percent)
        check(page, net, net.budget(macs=f"{percent}%").position)
    page.fill("#share", "0.1")
    check(page, net, len(net.strata))
    page.focus("#slider")
    low = net.budget(macs=1.0).low
    assert page.input_value("#share") == f"{100 * low / net.macs():.1f}"


@pytest.mark.browser
def test_the_curve(net, points, look):
    page = look(net, points, latency=QUICK)
    data = page.evaluate("JSON.parse(document.getElementById('data').textContent)")
    assert page.locator(".point").count() == len(points)
    for axis, title in (("params", "parameters"), ("ms", "milliseconds per batch"), ("macs", "MACs per image")):
        page.check(f"input[value={axis}]")
        assert title in page.get_attribute("#curve svg", "aria-label")
        place = [float(x) for x in page.eval_on_selector_all(".dot", "all => all.map(e => e.getAttribute('cx'))")]
        value = [point[axis] for point in data["points"]]
        assert all(x - 44 == pytest.approx((place[0] - 44) * v / value[0]) for x, v in zip(place, value, strict=True))
        assert page.eval_on_selector(".here", "line => line.style.display") == ("none" if axis == "ms" else "")
    for shown, point in zip(data["points"], points, strict=True):
        dot = page.locator(f".point[data-position='{shown['position']}']")
        dot.hover()
        lines = page.inner_text("#tip").splitlines()
        assert lines[0].startswith(f"top-1 {point.top1:.2f} % ± ")
        assert lines[1] == f"MACs {point.macs:,} ({point.share:.1%})".replace("%", " %")
        assert lines[2] == f"parameters {point.params:,}"
        assert f"{shown['ms']:.2f} ms" in lines
        assert f"loss {point.loss:.3f}" in lines
        dot.click()
        check(page, net, shown["position"])
        assert page.text_content("#nearest").startswith(f"top-1 {point.top1:.2f} %")
        assert page.text_content("#nearest-more") == "exactly this size"
    page.mouse.move(0, 0)
    assert page.is_hidden("#tip")
    rows = page.eval_on_selector_all("#curve-table tbody tr", "all => all.map(e => e.children[5].textContent)")
    assert rows == [f"{point.top1:.2f}" for point in points]


@pytest.mark.browser
def test_between_and_beyond_the_points(net, points, look):
    """The nearest point is named, no blend of two; the mark stays inside where only small sizes were measured."""
    page = look(net, points)
    for position in range(0, len(net.strata) + 1, 7):
        move(page, len(net.strata) - position)
        macs = net.macs(net.spec(position=position))
        away = [abs(point.macs - macs) for point in points]
        nearest = [f"top-1 {p.top1:.2f} %" for p, far in zip(points, away, strict=True) if far == min(away)]
        assert page.text_content("#nearest") in nearest
    page = look(net, points[-1:])
    for axis in ("macs", "params"):
        page.check(f"input[value={axis}]")
        move(page, len(net.strata))
        mark, svg = (page.locator(name).bounding_box() for name in (".here", "#curve svg"))
        assert svg["x"] < mark["x"] <= svg["x"] + svg["width"]


@pytest.mark.browser
def test_the_heat_map(any_net, look):
    """Every unit of some rows, by pointer; the tip names when it leaves, and the colours are as the legend says."""
    page = look(any_net, width=1400)
    gone = {}
    widths = dict(any_net.resolve(None))
    for number, entry in enumerate(any_net.strata.entries, 1):
        steps = next(site.steps for site in any_net.sites if site.name == entry.site)
        for step in [step for step in steps if entry.width <= step < widths[entry.site]]:
            gone[entry.site, step] = number
        widths[entry.site] = entry.width
    page.locator("#heat").scroll_into_view_if_needed()
    names = page.eval_on_selector_all("#heat-names div", "all => all.map(e => e.textContent)")
    assert names == [site.name for site in any_net.sites]
    box = page.locator("#heat").bounding_box()
    height = box["height"] / len(any_net.sites)
    for row in (0, len(any_net.sites) - 1):
        site = any_net.sites[row]
        units = len(site.steps) - 1
        for unit in range(0, units, 1 + units // 8):
            page.mouse.move(box["x"] + (unit + 0.5) / units * box["width"], box["y"] + (row + 0.5) * height)
            when = gone.get((site.name, site.steps[unit]))
            told = page.inner_text("#tip")
            assert told.startswith(f"{site.name}, unit {unit + 1} of {units}\n")
            assert f": {site.steps[unit]} to {site.steps[unit + 1] - 1}\n" in told
            assert ("never leaves" if when is None else f"position {when} of {len(any_net.strata)},") in told
    count = sum(len(site.steps) - 1 for site in any_net.sites) - len(gone)
    assert f"never ({count} unit" in page.text_content("#heat-legend")
    purple = page.evaluate(
        """() => {
            const { width, height } = document.getElementById("heat");
            const rgba = document.getElementById("heat").getContext("2d").getImageData(0, 0, width, height).data;
            for (let i = 0; i < rgba.length; i += 4)
                if (rgba[i] === 192 && rgba[i + 1] === 68 && rgba[i + 2] === 143) return true;
            return false;
        }"""
    )
    assert purple == (count > 0)


@pytest.mark.browser
def test_sizes_only(net, look):
    page = look(net, run="my run")
    note = page.text_content("#curve-note")
    assert "stratavit curve 'my run' --data DIR --out curve" in note
    assert "stratavit report 'my run' --curve curve" in note
    assert page.is_hidden("#axes")
    assert page.text_content("#nearest") == "none"


@pytest.mark.browser
def test_hostile_strings_are_shown_as_they_are(points, look):
    odd = [Point(**vars(point) | {"asked": HOSTILE}) for point in points]
    page = look(hostile_net(), odd, title=HOSTILE, run=HOSTILE)
    assert page.title().startswith("</script><script>window.owned = 1</script><img")
    assert page.text_content("#title") == HOSTILE.replace("\ud800", "?")
    assert "</script><script>" in page.text_content("#facts")
    page.hover(".point >> nth=0")
    assert "onerror=" in page.inner_text("#tip")
    assert page.evaluate("window.owned === undefined && document.images.length === 0")


@pytest.mark.browser
@pytest.mark.parametrize("hostile", [False, True])
def test_narrow_windows(hostile, points, look):
    net = hostile_net() if hostile else net_of(SWIN)
    odd = [Point(**vars(point) | {"asked": LONG}) for point in points] if hostile else []
    page = look(net, odd, width=400, scheme="dark", title=LONG if hostile else None, run=LONG if hostile else "run")
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    outside = page.eval_on_selector_all(
        "main *", "all => all.filter(e => !e.closest('.scroll') && e.getBoundingClientRect().right > 400.5).length"
    )
    assert outside == 0

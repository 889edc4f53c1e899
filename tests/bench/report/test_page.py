"""The report: one file that needs nothing else, says where its numbers come from, and works in a browser."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
import yaml
from matplotlib.figure import Figure
from PIL import Image
from tests.bench.browser import chromium
from tests.bench.suites import pattern, row, write_suite

from san_bench.report.figures.analysis import Picture
from san_bench.report.page.html import Compared, Page, read_page, report_to_html, write_report
from san_bench.report.tables.settings import side_by_side
from san_bench.run.results import Cell, ResultTable
from san_peft.errors import SanError

VOID = {"meta", "link", "br", "wbr", "img", "input"}
LOADING = {"src", "srcset", "href", "xlink:href", "action", "formaction", "poster", "data", "background"}
HOSTILE = "--><script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


class Elements(HTMLParser):
    """Every element with its attributes and the text within it; fails where tags do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        assert not self.open, [tag for tag, _, _ in self.open]

    def handle_starttag(self, tag, attrs):
        element = (tag, dict(attrs), [])
        self.found.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self.open[-1][0] == tag, f"</{tag}> closes <{self.open[-1][0]}>"
        self.open.pop()

    def handle_data(self, data):
        for _, _, texts in self.open:
            texts.append(data)

    def all(self, *tags):
        return [(attrs, "".join(texts)) for tag, attrs, texts in self.found if tag in tags]

    def texts(self, tag):
        return [" ".join(text.split()) for _, text in self.all(tag)]


def published():
    cells = (Cell("LoRA", published=True), Cell("published [1]", hint="A paper", published=True))
    return (*cells, Cell("74.5", 74.5, published=True))


def page(name="san", pictures=(), **changes):
    """A page by hand."""
    measured = [(Cell(name), Cell("measured"), Cell(f"{value} ± 1", value, "seeds 0, 1")) for value in (71.0, 9.5)]
    columns = ("Method", "Source", "Natural")
    table = ResultTable(f"made-up, vit ({name}), test: means", columns, (*measured, published()), ("[1] A paper.",))
    nothing = ResultTable("", (), (), ())
    recipes = Compared((name, "ssf"), tuple(side_by_side([[{"lr": 0.1, "seed": 0}], [{"lr": 0.2, "seed": 0}]])))
    values = {
        "title": name,
        "when": "2026-01-01",
        "command": (f"san bench {name}",),
        "facts": (("Runs", "2"),),
        "tables": (table,),
        "pictures": pictures,
        "recipes": recipes,
        "runs": nothing,
        "failures": (),
        "data": nothing,
        "origins": Compared((), ()),
    }
    return Page(**{**values, **changes})


def drawing(name):
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 2], [1, 2], color="#0072B2", label=name)
    axes.set_title(name.replace("$", ""))
    axes.legend()
    return Picture(name, f"A line of {name}; n = 2.", figure)


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """A suite of two methods on two tasks with two seeds, whose runs have recipes, logs and scales."""
    folder = tmp_path_factory.mktemp("suite")
    rows = [
        row(f"mine/{task}", method, seed, accuracy=base + seed / 100, lr=0.01, group=None)
        for task in ("leaves", "stones")
        for method, base in (("san", 0.9), ("ssf", 0.1))
        for seed in (0, 1)
    ]
    write_suite(folder, rows, lambda one: [2.0, 1.0, 0.5] * 20, lambda one: pattern(one["task"], one["seed"]))
    for one in rows:
        method = {"kind": one["method"], **({"propagation": "all"} if one["method"] == "san" else {})}
        recipe = {"task": one["task"], "method": method, "seed": one["seed"], "output": one["run"]}
        (folder / one["run"] / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    failures = [
        {"task": "mine/leaves", "backbone": "vit", "method": "san", "seed": 0, "error": "the disk was full"},
        {"task": "mine/sand", "backbone": "vit", "method": "dora", "seed": 3, "error": "the disk was full"},
    ]
    (folder / "failures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in failures))
    (folder / "commands.txt").write_text("san bench mine --seeds 2\n")
    (folder / "suite.yaml").write_text('{"protocol": "mine"}\n')
    write_report(folder, folder / "report.html")
    return folder


def check_structure(text):
    """Nothing comes from elsewhere, ids are there once, and every picture has words."""
    elements = Elements(text)
    ids = [attrs["id"] for _, attrs, _ in elements.found if "id" in attrs]
    assert len(ids) == len(set(ids))
    words = {attrs["id"]: "".join(texts).strip() for _, attrs, texts in elements.found if "id" in attrs}
    for tag, attrs, _ in elements.found:
        for key in LOADING & attrs.keys():
            assert attrs[key].startswith(("#", "data:")), f"<{tag} {key}={attrs[key]!r}>"
            assert not attrs[key].startswith("#") or attrs[key][1:] in ids, attrs[key]
        for label in attrs.get("aria-labelledby", "").split():
            assert words[label], label
        if tag == "svg":
            assert attrs["role"] == "img"
            assert "aria-labelledby" in attrs
        assert tag != "img" or attrs.get("alt")
    assert "@import" not in text
    assert all(target.startswith(("#", "data:")) for target in re.findall(r"url\(\s*['\"]?([^)]*)", text))
    assert re.findall(r"https?://[^\"'\s<]+", text) == ["http://www.w3.org/1999/xlink"] * text.count("xmlns:xlink")
    return elements


def test_it_holds_everything_itself(suite):
    elements = check_structure((suite / "report.html").read_text())
    assert len(elements.all("svg")) >= 5
    assert len(elements.all("svg")) == len(elements.all("figcaption"))
    policy = next(attrs["content"] for attrs, _ in elements.all("meta") if attrs.get("http-equiv"))
    assert policy.startswith("default-src 'none';")


def test_it_says_what_was_done(suite):
    elements = check_structure((suite / "report.html").read_text())
    title, *others = elements.texts("h2")
    assert title == "mine of made-up, vit (embedded), test"
    assert others == ["Figures", "Recipes", "Failures", "Runs", "Provenance"]
    assert elements.all("pre")[-2][1].splitlines()[0] == "san bench mine --seeds 2"
    assert elements.texts("pre")[-1] == '{"protocol": "mine"}'
    assert elements.texts("article") == [
        "the disk was full san, mine/leaves, vit, seed 0: finished since "
        "dora, mine/sand, vit, seed 3: missing from the results"
    ]
    terms = dict(zip(elements.texts("dt")[:6], elements.texts("dd")[:6], strict=True))
    assert terms == {"Runs": "8", "Tasks": "2", "Backbones": "1", "Methods": "2", "Seeds": "2", "Failed": "2"}
    assert set(elements.texts("mark")) == {"Marked", "san", "ssf", "all"}
    assert "output" not in elements.texts("code")


def test_text_of_others_is_never_code():
    text = report_to_html(page(HOSTILE, pictures=(drawing(HOSTILE),), plan=HOSTILE))
    elements = check_structure(text)
    assert len(elements.all("script")) == 1
    assert not elements.all("img")
    assert elements.texts("h1") == [" ".join(HOSTILE.split())]
    assert not any(key.startswith("on") for _, attrs, _ in elements.found for key in attrs)


def test_published_lines_are_marked():
    elements = check_structure(report_to_html(page()))
    rows = [(attrs.get("class"), text.split()[0]) for attrs, text in elements.all("tr")]
    assert rows[:4] == [(None, "Method"), (None, "san"), (None, "san"), ("published", "LoRA")]
    assert [text for attrs, text in elements.all("span") if attrs.get("class") == "badge"] == ["published"]
    notes = next(attrs for attrs, _ in elements.all("details") if attrs.get("class") == "notes")
    assert "open" in notes


def test_greys_of_pictures_are_the_pages():
    svg = report_to_html(page(pictures=(drawing("a"), drawing("b")))).partition("<svg")[2]
    assert "#0072b2" in svg
    assert "var(--ink)" in svg
    assert not re.search(r"#(000000|ffffff)", svg)


def test_settings_stand_side_by_side():
    many = [{"task": f"t{i}", "seed": i, "lr": 0.1} for i in range(9)]
    found = side_by_side([many, [{"task": "t0", "method": {"targets": ["q", "v"], "bound": None}, "lr": 0.1}]])
    assert [(s.name, s.values, s.differs) for s in found] == [
        ("task", ("t0, t1, t2, t3, t4, t5, t6, t7 and 1 more", "t0"), True),
        ("method.targets", ("", "[q, v]"), True),
        ("method.bound", ("", "null"), True),
        ("seed", ("0 to 8 (9 values)", ""), True),
        ("lr", ("0.1", "0.1"), False),
    ]


def test_true_and_one_are_not_the_same():
    (setting,) = side_by_side([[{"gate": True}], [{"gate": 1}]])
    assert setting.values == ("true", "1")
    assert setting.differs


def test_a_suite_in_which_nothing_finished_is_reported(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    (tmp_path / "failures.jsonl").write_text('{"task": "t", "method": "san", "error": "no data"}\n')
    write_report(tmp_path, tmp_path / "out" / "page.html")
    elements = check_structure((tmp_path / "out" / "page.html").read_text())
    assert elements.texts("article") == ["no data san, t, unknown, seed unknown: missing from the results"]
    assert not elements.all("table")


def test_machines_that_differ_stand_apart(suite, tmp_path):
    rows = [row("t", "san", seed, device=device) for seed, device in enumerate(("cpu", "cpu", "some GPU"))]
    write_suite(tmp_path, rows)
    found = read_page(tmp_path, tmp_path / "report.html").origins
    assert found.columns == ("2 runs, 2026-01-01", "1 run, 2026-01-01")
    assert [setting.name for setting in found.settings if setting.differs] == ["device"]


def test_what_cannot_be_read_is_named_and_nothing_is_written(tmp_path):
    out = tmp_path / "report.html"
    with pytest.raises(SanError, match=r"rows.jsonl.*result.json"):
        write_report(tmp_path, out)
    one = row("t", "san", 0)
    write_suite(tmp_path, [one])
    (tmp_path / "failures.jsonl").write_text('{}\n{"task"\n3\n')
    with pytest.raises(SanError, match=r"(?s)failures\.jsonl:2: .*failures\.jsonl:3: "):
        write_report(tmp_path, out)
    (tmp_path / "failures.jsonl").unlink()
    (tmp_path / one["run"]).mkdir(parents=True)
    (tmp_path / one["run"] / "recipe.yaml").write_text("task: [\n")
    with pytest.raises(SanError, match=r"(?s)1 .*recipe\.yaml:2: not YAML"):
        write_report(tmp_path, out)
    (tmp_path / one["run"] / "recipe.yaml").write_text("- task\n")
    with pytest.raises(SanError, match=r"recipe.yaml: expected a mapping"):
        write_report(tmp_path, out)
    assert not out.exists()
    (tmp_path / one["run"] / "recipe.yaml").unlink()
    with pytest.raises(SanError, match=r"cannot be written: Is a directory. Choose another file with --out"):
        write_report(tmp_path, tmp_path)


def test_in_a_browser(suite, tmp_path):
    """Columns sort by mouse and by keyboard, lines filter, and the page fits a phone, in the light and in the dark."""
    with chromium() as browser:
        errors, requests = [], []
        tab = browser.new_page(viewport={"width": 1360, "height": 900})
        tab.on("pageerror", lambda error: errors.append(error))
        tab.on("console", lambda message: errors.append(message.text))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto((suite / "report.html").as_uri())
        table = tab.locator("table.sorts").first

        def column(place):
            return [text.strip() for text in table.locator(f"tbody tr > :nth-child({place})").all_inner_texts()]

        given = column(1)
        head = table.locator("thead th").nth(4)
        assert given == ["ssf", "san"]
        assert head.get_attribute("aria-sort") is None
        head.get_by_role("button").click()
        assert (head.get_attribute("aria-sort"), column(5)) == ("ascending", ["10.5 ± 0.7", "90.5 ± 0.7"])
        head.get_by_role("button").press("Enter")
        assert (head.get_attribute("aria-sort"), column(5)) == ("descending", ["90.5 ± 0.7", "10.5 ± 0.7"])
        head.get_by_role("button").press("Space")
        assert (head.get_attribute("aria-sort"), column(1)) == (None, given)
        assert not tab.locator(".hint").first.is_visible()
        tab.check("#hints")
        assert tab.locator(".hint").first.is_visible()
        assert errors == []
        assert {url.partition(":")[0] for url in requests} <= {"file", "data"}
        tab.close()

        paper = {}
        for width, height in ((390, 844), (1360, 900)):
            for scheme in ("light", "dark"):
                tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
                tab.goto((suite / "report.html").as_uri())
                tab.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
                assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), (width, scheme)
                shot = tmp_path / f"{width}-{scheme}.png"
                tab.screenshot(path=shot, full_page=True)
                paper[width, scheme] = sum(Image.open(shot).convert("RGB").getpixel((2, 2)))
                tab.locator("figure svg").first.scroll_into_view_if_needed()
                ink = tab.locator("figure svg").first.evaluate("(svg) => getComputedStyle(svg).fill")
                assert ink == {"light": "rgb(17, 24, 39)", "dark": "rgb(241, 245, 249)"}[scheme]
                tab.close()
        assert all(paper[width, "light"] > 700 and paper[width, "dark"] < 150 for width in (390, 1360)), paper


def test_lines_are_filtered_in_a_browser(tmp_path):
    file = tmp_path / "page.html"
    lines = tuple((Cell(f"method {i}"), Cell(["vit", "swin"][i % 2])) for i in range(20))
    file.write_text(report_to_html(page(tables=(ResultTable("a: b", ("Method", "Backbone"), lines, ()),))))
    with chromium() as browser:
        tab = browser.new_page()
        tab.goto(file.as_uri())
        tab.get_by_role("searchbox").fill("SWIN 3")
        assert tab.locator(".filter output").inner_text() == "2 of 20"
        assert tab.locator("table.sorts tbody th:visible").all_inner_texts() == ["method 3", "method 13"]


def test_without_scripts_all_is_there(suite):
    with chromium() as browser:
        tab = browser.new_context(java_script_enabled=False).new_page()
        tab.goto((suite / "report.html").as_uri())
        assert tab.locator("table.sorts thead th").first.inner_text() == "Method"
        assert tab.locator("table.sorts button").count() == 0
        tab.locator(".notes summary").first.click()
        assert tab.locator(".notes p").first.inner_text().startswith("Top-1 accuracy")

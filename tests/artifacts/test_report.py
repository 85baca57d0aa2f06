"""The report: one file with all that a run left, which loads nothing, breaks on nothing and can be read anywhere."""

import base64
import csv
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageSequence

from conftest import needs_newest
from ddpo_trl import DDPOConfig, DDPOTrainer
from ddpo_trl.artifacts.record import write_settings
from ddpo_trl.artifacts.report import write_report
from ddpo_trl.artifacts.report.charts import evaluation_charts, policy_charts, reward_charts, time_phases
from ddpo_trl.artifacts.report.numbers import duration, number, short
from ddpo_trl.artifacts.report.settings import compare


COLOURS = {0: (200, 30, 30), 1: (30, 200, 30), 2: (30, 30, 200)}
PROMPTS = ["a cat", "</script><script>document.title = 'taken over'</script><b>bold</b>"]
ROWS: list[dict[str, Any]] = [
    {
        "round": round,
        "episode": 64 * round,
        "reward": -3.0 + round,
        "reward_std": 0.5,
        "rewards/size/mean": -3.0 + round,
        "rewards/size/std": 0.5,
        "policy/clipfrac_avg": 0.1 * round,
        "learning_rate": 1e-3,
        "time/sampling": 6.0,
        "time/training": 12.0,
        "time/waiting_for_rewards": 2.0,
        "time/scoring": 4.0,
        "eval_reward": -2.0 if round == 2 else None,
    }
    for round in (1, 2)
]


def write_metrics(folder: Path, rows: list[dict[str, Any]]) -> None:
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_samples(folder: Path, round: int, size: tuple[int, int] = (16, 16)) -> None:
    """An image of one colour per prompt, and from round 1 on a best and a worst one."""
    place = folder / "samples" / f"round-{round:04d}"
    place.mkdir(parents=True)
    kinds = ["fixed"] * len(PROMPTS) + (["best", "worst"] if round else [])
    entries = []
    for index, kind in enumerate(kinds):
        name = f"{kind}-{index:02d}.png"
        Image.new("RGB", size, COLOURS.get(round, (0, 0, 0))).save(place / name)
        reward = -3.0 + round + index
        prompt = PROMPTS[index % len(PROMPTS)]
        entries.append(
            {
                "kind": kind,
                "file": name,
                "prompt": prompt,
                "seed": index,
                "reward": reward,
                "rewards": {"size": reward},
            }
        )
    (place / "samples.json").write_text(json.dumps(entries))


@pytest.fixture
def folder(tmp_path) -> Path:
    """What a run of two rounds leaves."""
    folder = tmp_path / "my <run>"
    folder.mkdir()
    write_metrics(folder, ROWS)
    for round in (0, 1, 2):
        write_samples(folder, round)
    write_settings(folder, DDPOConfig(output_dir=str(folder), use_cpu=True, cliprange=0.02))
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13.0 <cpu>"}))
    return folder


class Page(HTMLParser):
    """The elements of a page, and what is in its title and its data."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attributes}))

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.elements[-1][0] if self.elements else "", []).append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


# ---- The file ----


def test_the_report_is_one_file_that_refers_to_nothing_outside(folder):
    path = write_report(folder)
    assert path == folder / "report.html"
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    references = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "data", "poster")
    ]
    assert references and all(reference.startswith("data:") for reference in references)
    assert not re.search(r"@import|url\(", html)
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "'unsafe-eval'" not in policy
    assert "'unsafe-inline'" not in policy.partition("script-src")[2]


def test_the_report_goes_where_it_is_told(folder, tmp_path):
    assert write_report(str(folder), tmp_path / "elsewhere.html") == tmp_path / "elsewhere.html"
    assert not (folder / "report.html").exists()


def test_what_comes_from_the_run_is_text_and_never_markup(folder):
    page = page_of(folder)
    assert not page.all("b")
    assert len(page.all("script")) == 3  # the curves, the charts' script and the page's own
    assert "".join(page.texts["title"]).strip() == "my <run> · DDPO report"
    assert any(attributes["alt"].startswith(PROMPTS[1]) for attributes in page.all("img"))


def test_a_column_can_not_end_the_script_that_holds_the_curves(folder):
    column = "rewards/</script><img src=x>/mean"
    write_metrics(folder, [row | {column: index} for index, row in enumerate(ROWS)])
    html = write_report(folder).read_text(encoding="utf-8")
    assert "<img src=x>" not in html
    curves = re.search(r'<script type="application/json" id="curves">(.*?)</script>', html, re.DOTALL)
    assert curves and column in json.loads(curves[1])


def test_every_image_has_a_text_and_a_size(folder):
    images = page_of(folder).all("img")
    assert len(images) == 2 + 4 + 4
    assert all(image["alt"] and image["width"] == image["height"] == "16" for image in images)


# ---- What is missing ----


@pytest.mark.parametrize("name", ["metrics.csv", "samples", "ddpo_config.json", "environment.json"])
def test_what_is_missing_is_named_and_the_rest_is_shown(folder, name):
    gone = folder / name
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    html = write_report(folder).read_text(encoding="utf-8")
    assert f"no {name}" in html
    sections = {"metrics.csv": "reward", "samples": "samples", "ddpo_config.json": "settings"} | {
        "environment.json": "environment"
    }
    shown = {section for section in sections.values() if f'<h2 id="{section}">' in html}
    assert shown == set(sections.values()) - {sections[name]}


def test_nothing_is_said_to_be_missing_when_all_is_there(folder):
    assert 'class="missing" aria-label' not in write_report(folder).read_text(encoding="utf-8")


def test_a_run_that_ended_while_it_wrote_still_has_a_report(folder):
    (folder / "samples/round-0002/samples.json").write_text('[{"kind": "fix')
    (folder / "samples/round-0001/fixed-00.png").write_bytes(b"\x89PNG")
    (folder / "samples/round-0001/fixed-01.png").unlink()
    html = write_report(folder).read_text(encoding="utf-8")
    assert "round-0002/samples.json is not complete" in html
    assert all(html.count(f"{name} can't be read") == 1 for name in ("fixed-00.png", "fixed-01.png"))


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_a_run_is_refused_by_name(tmp_path, exists):
    if exists:
        (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is not the output_dir of a run.*metrics\.csv.*output_dir"):
        write_report(tmp_path / "empty")


@pytest.mark.parametrize("text", ["round,episode\n1,abc\n", "a,b\n1,2\n"])
def test_a_table_of_something_else_is_refused_by_name(tmp_path, text):
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.csv is not the metrics\.csv of a run"):
        write_report(tmp_path)


# ---- Images ----


def test_large_images_are_scaled_and_the_page_says_to_what(tmp_path):
    write_samples(tmp_path, 0, size=(2000, 1000))
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert {(image["width"], image["height"]) for image in Page(html).all("img")} == {("512", "256")}
    assert "at most 512 pixels" in html


def test_of_many_logged_rounds_some_are_shown_with_the_first_and_the_last(tmp_path):
    for round in range(0, 100):
        write_samples(tmp_path, round, size=(2, 2))
    html = write_report(tmp_path).read_text(encoding="utf-8")
    labels = re.findall(r'data-label="([^"]*?) ·', html)
    assert len(labels) == 24 and (labels[0], labels[-1]) == ("Before training", "Round 99")
    assert "Of 100 logged rounds 24 are shown" in html


def test_videos_move(tmp_path):
    write_samples(tmp_path, 0)
    frames = [Image.new("RGB", (16, 16), colour) for colour in COLOURS.values()]
    frames[0].save(tmp_path / "samples/round-0000/fixed-00.gif", save_all=True, append_images=frames[1:])
    moving, _ = (image["src"] for image in page_of(tmp_path).all("img"))
    with Image.open(io.BytesIO(base64.b64decode(moving.partition(",")[2]))) as image:
        assert sum(1 for _ in ImageSequence.Iterator(image)) == 3


# ---- Figures ----


def test_each_column_is_in_its_section_and_none_in_two():
    rows = [
        {"round": r, "episode": 8.0 * r, "epoch": r, "step": r, "reward": r, "reward_std": 1, "rewards/a/mean": r}
        | {"rewards/a/std": 1, "rewards/b/mean": r, "rewards/b/std": 1, "rewards/invalid": r / 10, "new/figure": r}
        | {"policy/clipfrac_avg": r, "learning_rate": 0.1, "eval_reward": r, "eval_reward_std": 1, "eval_runtime": r}
        | {"time/sampling": 1, "time/training": 2, "time/waiting_for_rewards": 1, "eps": r}
        for r in (1.0, 2.0)
    ]
    assert [chart.key for chart in reward_charts(rows)] == ["reward", "rewards/a/mean", "rewards/b/mean"]
    drawn = [chart.key for chart in policy_charts(rows) if chart.constant is None]
    assert drawn == ["policy/clipfrac_avg", "rewards/invalid", "new/figure"]
    assert [chart.key for chart in evaluation_charts(rows)] == ["eval_reward"]
    assert [chart.spread for chart in reward_charts(rows)] == [[1, 1]] * 3


def test_a_curve_has_the_rounds_in_which_it_was_measured():
    rows = [{"round": r, "episode": 8.0 * r} | ({"eval_reward": float(r)} if r % 2 else {}) for r in range(1, 6)]
    (chart,) = evaluation_charts(rows)
    assert (chart.queries, list(chart.lines.values())) == ([8.0, 24.0, 40.0], [[1.0, 3.0, 5.0]])


def test_the_time_is_split_into_what_was_done_one_after_the_other():
    shares = {phase.name: (phase.seconds, phase.share) for phase in time_phases(ROWS)}
    assert shares == {"Sampling": (12, 0.3), "Training": (24, 0.6), "Waiting for rewards": (4, 0.1)}


@needs_newest("older versions of Trainer fill fsdp_config, which is then shown too")
def test_settings_that_differ_from_the_defaults_are_those_that_were_given(tmp_path):
    given: dict[str, Any] = {"eta": 0.5, "train_timestep_range": [0, 0.8], "seed": 7, "disable_tqdm": False}
    write_settings(tmp_path, DDPOConfig(output_dir=str(tmp_path), **given))
    settings = compare(json.loads((tmp_path / "ddpo_config.json").read_text()))
    assert {one.name: (one.value, one.default) for one in settings if one.chosen} == {
        "eta": ("0.5", "1.0"),
        "train_timestep_range": ("[0, 0.8]", "[0.0, 1.0]"),
        "num_mini_batches": ("4", "–"),
        "output_dir": (str(tmp_path), "–"),
        "seed": ("7", "42"),
    }


def test_a_setting_of_another_version_is_shown():
    (setting,) = compare({"of_tomorrow": 1})
    assert setting.chosen and setting.default == "unknown"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (float("nan"), "–"), (1536.0, "1,536"), (-2.76345, "−2.763"), (5e-9, "5e−09"), (0.0, "0")],
)
def test_numbers_are_short_and_have_a_true_minus(value, text):
    assert number(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.6, "0.600"), (-2.0, "−2.00"), (123.0, "123"), (4567.8, "4,568")])
def test_numbers_side_by_side_have_three_digits(value, text):
    assert short(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.02, "< 0.1 s"), (0.64, "0.6 s"), (59.7, "1 min 0 s"), (243, "4 min 3 s"), (7500, "2 h 5 min")],
)
def test_durations_have_two_units(seconds, text):
    assert duration(seconds) == text


def test_a_run_ends_with_its_report(make_config, pipeline):
    config = make_config(log_images_rounds=1, num_logged_images=2)
    DDPOTrainer(config, lambda images, prompts, metadata: images.mean((1, 2, 3)), ["a", "b"], pipeline).train()
    page = Page(Path(config.output_dir, "report.html").read_text(encoding="utf-8"))
    assert len(page.all("img")) == 2 + 2 + 3  # before and after one round, and its best, median and worst
    assert {"reward", "samples", "policy", "time", "settings", "environment"} <= {h2["id"] for h2 in page.all("h2")}
    assert not [aside for aside in page.all("aside") if aside["class"] == "missing"]


# ---- In a browser ----


WIDTHS = {"desktop": 1280, "phone": 375}

# The least contrast of a text with what is behind it, by WCAG's formula.
CONTRAST = """() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = (colour) => {
    const [r, g, b] = channels(colour).slice(0, 3).map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const colour = getComputedStyle(element).backgroundColor;
    return channels(colour)[3] === 0 ? behind(element.parentElement) : colour;
  };
  const texts = [...document.querySelectorAll("main *")].filter(
    (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()) && !element.disabled);
  return Math.min(...texts.map((element) => {
    const [a, b] = [getComputedStyle(element).color, behind(element)].map(luminance);
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }));
}"""

# Pixels of each chart that are bluer than red: those of the curves.
CURVE_PIXELS = """() => [...document.querySelectorAll("canvas")].map((canvas) => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let count = 0;
  for (let i = 0; i < data.length; i += 4) count += data[i + 3] > 200 && data[i + 2] > data[i] + 60;
  return count;
})"""

LAYOUT_SHIFT = """() => new Promise((resolve) => {
  let sum = 0;
  new PerformanceObserver((list) => list.getEntries().forEach((entry) => (sum += entry.value)))
    .observe({ type: "layout-shift", buffered: true });
  setTimeout(() => resolve(sum), 100);
})"""


@pytest.fixture
def open_report(browser, folder) -> Iterator[Callable[..., Any]]:
    """Opens the report of the folder; at the end nothing may have gone wrong and nothing been asked for."""
    path = write_report(folder)
    problems: list[str] = []
    contexts = []

    def open_page(width: int = 1280, scheme: str = "light") -> Any:
        size = {"width": width, "height": 800}
        contexts.append(browser.new_context(viewport=size, color_scheme=scheme, is_mobile=width < 600))
        page = contexts[-1].new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.append(request.url) if request.url[:5] == "http:" else None)
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not problems


def shown_colour(page: Any) -> Any:
    """Mean colour of the first sample, as it is seen."""
    with Image.open(io.BytesIO(page.locator(".round.shown img").first.screenshot())) as image:
        return image.convert("RGB").resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_the_page_fits_and_can_be_read(open_report, width, scheme):
    page = open_report(width, scheme)
    page.locator("details").evaluate_all("all => all.forEach((one) => (one.open = true))")
    for narrower in (width, width - 15):  # of the phones the smallest has 360
        page.set_viewport_size({"width": narrower, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= narrower
    assert page.evaluate(CONTRAST) >= 4.5
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 384) == (scheme == "dark")
    drawn = page.evaluate(CURVE_PIXELS)
    assert len(drawn) == 4 and min(drawn) > 10  # one of them is a single point


def test_the_charts_follow_the_colour_scheme(open_report):
    page = open_report()
    canvas = page.locator("canvas").first
    light = canvas.screenshot()
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(100)
    dark, reopened = canvas.screenshot(), open_report(scheme="dark").locator("canvas").first.screenshot()
    assert light != dark == reopened


def test_the_slider_goes_through_the_rounds_by_keyboard_and_by_button(open_report):
    page = open_report()
    slider, label = page.get_by_role("slider", name="Round"), page.locator("#round-label")
    assert shown_colour(page) == pytest.approx(COLOURS[2], abs=8)
    for round, key in ((0, "Home"), (1, "ArrowRight"), (2, "End"), (1, "ArrowLeft")):
        slider.press(key)
        assert shown_colour(page) == pytest.approx(COLOURS[round], abs=8)
        assert label.text_content() == slider.get_attribute("aria-valuetext")
    assert label.text_content() == "Round 1 · 64 reward queries · mean reward −1.50"
    page.get_by_role("button", name="Earlier round").click()
    assert shown_colour(page) == pytest.approx(COLOURS[0], abs=8)
    assert page.get_by_role("button", name="Earlier round").is_disabled()


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_nothing_moves_when_the_charts_come_or_the_round_changes(open_report, width):
    page = open_report(width)
    assert page.evaluate(LAYOUT_SHIFT) == 0
    heights = set()
    for key in ("Home", "ArrowRight", "End"):
        page.get_by_role("slider").press(key)
        heights.add(page.evaluate("document.documentElement.scrollHeight"))
    assert len(heights) == 1


def test_pointing_at_one_chart_tells_the_values_of_all(open_report):
    page = open_report()
    page.locator(".plot").first.hover(position={"x": 600, "y": 100})
    readings = page.locator(".reading").all_text_contents()
    assert readings[:2] == ["−2 at 64", "0.1 at 64"]
    assert readings[3].startswith("Sampling 6, Training 12, Waiting for rewards 2")


def test_charts_are_told_to_those_who_can_not_see_them(open_report):
    charts = open_report().get_by_role("img", name="reward queries")
    assert charts.count() == 4
    assert "from −2 to −1" in charts.first.get_attribute("aria-label")


def test_a_prompt_is_not_run(open_report):
    assert open_report().title() == "my <run> · DDPO report"

"""The documentation's site builds, stands alone and fits a phone."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
WIDTHS = {"desktop": 1280, "phone": 375}


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> tuple[Path, str]:
    """The site's folder, and what was printed while it was built. Only `make docs` has the theme's advertisement."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder, run.stdout + run.stderr


@pytest.fixture(scope="module")
def pages(build) -> list[Path]:
    return sorted(path for path in build[0].rglob("*.html") if path.name != "404.html")


def test_every_page_is_in_the_navigation_and_nothing_is_warned_of(build):
    _, printed = build
    assert "WARNING" not in printed
    assert 'not included in the "nav"' not in printed


def test_tables_are_tables(pages):  # GitHub reads one that follows a paragraph without a blank line, MkDocs does not
    assert [page.name for page in pages if re.search(r"\|--|\| --", page.read_text())] == []


def test_a_page_loads_nothing_from_elsewhere(build, pages):
    loading = re.compile(
        r"<(?:script|img|iframe|link rel=\"(?:stylesheet|preconnect|icon)\")[^>]+(?:src|href)=\"?(https?:|//)"
    )
    assert [page.name for page in pages if loading.search(page.read_text())] == []
    styles = [path for path in build[0].rglob("*.css") if re.search(r"url\([\"']?(https?:|//)", path.read_text())]
    assert styles == []


def test_docstrings_in_the_hugging_face_format_become_lists_and_links(build):
    config = (build[0] / "api" / "config.html").read_text()
    entry = r"<li>\s*(?:<p>)?<strong><code>num_inference_steps</code></strong> \(<code>int</code>, <em>optional</em>"
    assert re.search(entry, config)
    assert re.search(r'<a [^>]*href="trainer\.html#ddpo_trl\.DDPOTrainer"[^>]*><code>DDPOTrainer</code></a>', config)
    for page in (build[0] / "api").glob("*.html"):
        text = re.sub(r"<details class=\"mkdocstrings-source\">.*?</details>", "", page.read_text(), flags=re.DOTALL)
        left = re.findall(r"(?:Args|Parameters|Returns|Raises|Attributes|Example):</p>|\[<code>[~\w.]+</code>\]", text)
        assert left == [], page.name


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_pages_fit_and_formulas_are_typeset(browser, pages, width):
    context = browser.new_context(viewport={"width": width, "height": 800}, is_mobile=width < 600)
    tab = context.new_page()
    problems: list[str] = []
    tab.on("pageerror", lambda error: problems.append(str(error)))  # KaTeX raises on what it can't read
    tab.on("request", lambda request: problems.append(request.url) if request.url.startswith("http") else None)
    too_wide, formulas = [], 0
    for page in pages:
        tab.goto(page.as_uri())
        formulas += tab.locator(".katex").count()
        assert tab.locator(".arithmatex:not(:has(.katex))").count() == 0, page.name
        if tab.evaluate("document.documentElement.scrollWidth") > width:
            too_wide.append(page.name)
    context.close()
    assert (too_wide, problems) == ([], [])
    assert formulas > 50

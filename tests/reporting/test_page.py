"""The report as a reader gets it: complete, self-contained, harmless; looked at with a real browser."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fabricated import HOSTILE, Fabricated, fabricate

from clha.errors import UserError
from clha.reporting.noise_facts import noise_facts, noise_lines, read_noise
from clha.reporting.report import build_report
from clha.runs import Run, save_run
from clha.stages.report import make_report

FIGURES = {
    "gain", "reward-differences", "lengths", "reward-against-length", "candidate-rewards", "pair-gaps",
    "kept-by-distance", "candidate-length", "learning-curves", "better-and-worse", "reliability", "judges",
    "reward-learning-curve",
}  # fmt: skip


@pytest.fixture(scope="module")
def page(made: Fabricated) -> Path:
    return make_report(made.home, made.run.name)


@pytest.fixture(scope="module")
def html(page: Path) -> str:
    return page.read_text(encoding="utf-8")


class Elements(HTMLParser):
    """All start tags with their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_report_lies_where_the_contract_says_with_each_figure_as_png(made: Fabricated, page: Path) -> None:
    assert page == made.home.root / "reports" / "demo" / "report.html"
    assert {p.stem for p in (page.parent / "figures").glob("*.png")} == FIGURES
    left = [p for p in page.parent.rglob("*") if p.name.startswith(".tmp")]
    assert left == []


def test_it_loads_nothing_from_elsewhere_and_runs_nothing(html: str) -> None:
    elements = Elements(html).found
    assert not {"script", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in elements}
    assert not [a for _, attrs in elements for a in attrs if a.startswith("on")]
    for _, attrs in elements:
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert (attrs.get(name) or "#").startswith(("#", "data:")), attrs
    policies = [a["content"] for _, a in elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1 and "default-src 'none'" in str(policies[0])
    assert "@import" not in html


def test_the_verdict_doubts_and_all_figures_are_on_the_page(made: Fabricated, html: str) -> None:
    metrics = json.loads((made.nodes["evaluate"].folder / "metrics.json").read_text())
    assert metrics["verdict"]["outcome"] == "better"
    assert "The trained policy is better" in html
    assert "another seed may give another gain" in html
    assert set(re.findall(r'id="figure-([a-z-]+)"', html)) == FIGURES
    assert html.count('role="img" aria-label="') == len(FIGURES)


def test_a_gain_whose_interval_includes_zero_is_said_plainly(tmp_path: Path) -> None:
    made = fabricate(tmp_path / "home", gain=0.0, prompts=40, tests=30, hostile=False)
    html = make_report(made.home, "demo").read_text()
    assert "◆ Not told apart" in html
    assert "includes zero" in html


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_of_strangers_are_escaped_wherever_they_stand(html: str, text: str) -> None:
    assert text.replace("\x00", "") not in html
    assert "\x00" not in html and "\x1b" not in html and "\u202e" not in html
    tags = {tag for tag, _ in Elements(html).found}
    assert not {"script", "img", "b "} & tags


def test_control_tokens_are_shown_literally(html: str) -> None:
    assert "&lt;|im_end|&gt;" in html


def test_a_report_of_the_same_artifacts_is_left_alone_and_of_others_is_written_anew(tmp_path: Path) -> None:
    made = fabricate(tmp_path / "home", prompts=40, tests=12, hostile=False)
    page = make_report(made.home, "demo")
    before = page.stat().st_mtime_ns
    assert make_report(made.home, "demo").stat().st_mtime_ns == before
    run = replace(made.run, nodes={k: v for k, v in made.run.nodes.items() if k != "evaluate"})
    save_run(made.home, run)
    assert make_report(made.home, "demo").stat().st_mtime_ns != before


def test_a_run_that_is_not_evaluated_yet_has_a_report_of_what_there_is(tmp_path: Path) -> None:
    made = fabricate(tmp_path / "home", prompts=40, tests=12, hostile=False)
    kept = ("prepare", "fit_reward.train", "generate", "score", "weigh")
    html = build_report(made.home, made.run, {k: made.nodes[k] for k in kept}).read_text()
    assert "Not evaluated yet" in html
    assert set(re.findall(r'id="figure-([a-z-]+)"', html)) == {
        "candidate-rewards", "pair-gaps", "kept-by-distance", "candidate-length", "reliability",
        "reward-learning-curve",
    }  # fmt: skip
    only_prepare = build_report(made.home, made.run, {"prepare": made.nodes["prepare"]}).read_text()
    assert "Prompts per split" in only_prepare


def trained_by_an_adapter(made: Fabricated, without: tuple[str, ...]) -> None:
    """Make the training reward model one of method lora, whose fit.json lacks these fields of a head's."""
    fitted = made.nodes["fit_reward.train"]
    fit = json.loads((fitted.folder / "fit.json").read_text())
    for name in without:
        del fit[name]
    (fitted.folder / "fit.json").write_text(json.dumps(fit | {"pairs_trained_on": 640}))
    config = fitted.folder / "reward_model" / "config.json"
    config.write_text(json.dumps({"model_type": "llama", "clha": json.loads(config.read_text())}))


def learning_curves(html: str) -> list[str]:
    """Whose learning curves the page has, by the figure's own description."""
    said = re.search(r"Line chart of accuracy over the number of pairs\. ([^\"<]*)", html)
    assert said
    return [name.strip() for name in re.findall(r"([a-z ]+): \d", said[1])]


def test_a_reward_model_trained_by_an_adapter_has_its_learning_curve_beside_that_of_a_head(tmp_path: Path) -> None:
    made = fabricate(tmp_path, prompts=60, tests=20)
    trained_by_an_adapter(made, without=("l2", "agreement_between_halves"))
    html = build_report(made.home, made.run, made.nodes).read_text()
    assert learning_curves(html) == ["training reward model", "judge"]


def test_a_reward_model_trained_by_an_adapter_has_a_card_without_the_figures_of_heads(tmp_path: Path) -> None:
    made = fabricate(tmp_path, prompts=60, tests=20)
    trained_by_an_adapter(made, without=("l2", "agreement_between_halves", "learning_curve"))
    html = build_report(made.home, made.run, made.nodes).read_text()
    assert "640 other pairs" in html and html.count("agreement of two halves") == 1, "the judge is a head"
    assert learning_curves(html) == ["judge"]
    lines = dict(noise_lines(noise_facts(made.nodes, read_noise(made.nodes))))
    assert lines["reward model"].endswith("held-out pairs right")


def test_the_report_runs_as_a_process_and_prints_its_path(made: Fabricated, page: Path) -> None:
    command = [sys.executable, "-m", "clha.stages.report", "--home", str(made.home.root), "--run"]
    done = subprocess.run([*command, "demo"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(page))
    wrong = subprocess.run([*command, "absent"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert len(wrong.stderr.strip().splitlines()) == 1 and "no run `absent`" in wrong.stderr


def test_a_run_that_built_nothing_has_no_report(made: Fabricated) -> None:
    save_run(made.home, Run("empty", "demo", made.run.settings))
    with pytest.raises(UserError, match="has built nothing yet"):
        make_report(made.home, "empty")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    quiet = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    quiet += ["--disable-component-update", "--disable-sync"]
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=quiet)
        yield browser
        browser.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_browser_shows_it_without_errors_requests_or_overflow(
    browser: Any, page: Path, width: int, scheme: str
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    context.set_default_timeout(120_000)  # on a busy machine
    tab = context.new_page()
    said: list[str] = []
    requests: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(page.as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert said == []
    assert requests == [page.as_uri()]
    assert tab.title() == "demo: CLHA report"  # a script in an answer would have changed it
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    boxes = tab.evaluate(
        "[...document.querySelectorAll('figure svg')].map(s => { const b = s.getBoundingClientRect(); "
        "return [b.width, b.height] })"
    )
    assert len(boxes) == len(FIGURES)
    assert all(w > 250 and h > 100 for w, h in boxes)
    assert tab.locator("body").is_visible()
    shown = tab.locator("main").inner_text()
    assert "<script>document.title='owned'</script>" in shown
    assert "<|im_end|>" in shown and "⟨U+202E⟩gnirts" in shown and "{{ 7 * 7 }}" in shown
    ink = tab.evaluate("getComputedStyle(document.body).color")
    assert ink == ("rgb(29, 37, 51)" if scheme == "light" else "rgb(230, 234, 241)")
    context.close()

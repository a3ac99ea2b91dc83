"""The report in a real browser without a window: on a phone, on a desk, and printed. Needs Chromium, and the extra ``browser``."""

import os
import shutil

import pytest
from test_report import ENV, QUESTIONS, Road  # registers the environment

from sb3_qa.__main__ import main

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    from stable_baselines3 import PPO

    from sb3_qa.policies import qa_policy

    folder = tmp_path_factory.mktemp("page")
    model = PPO(qa_policy(PPO), Road(), policy_kwargs=dict(questions=QUESTIONS), device="cpu", seed=0)
    model.save(folder / "road.zip")
    out = folder / "report.html"
    told = [
        "report",
        str(folder / "road.zip"),
        "--env",
        ENV,
        "--out",
        str(out),
        "--episodes",
        "24",
        "--question",
        "fall[k=3]",
    ]
    assert main([*told, "--threshold", "0.3", "--clips", "2"]) == 0
    return out


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        path = CHROMIUM or playwright.chromium.executable_path
        if not os.path.exists(path):
            pytest.skip("there is no Chromium: apt-get install chromium, or python -m playwright install chromium")
        # The sandbox of Chromium refuses to be run by root, as in containers.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("media", ["screen", "print"])
def test_it_shows_itself_alone(browser, page_file, width, media):
    page = browser.new_page(viewport={"width": width, "height": 850})
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.emulate_media(media=media)
    page.goto(page_file.as_uri())
    page.wait_for_load_state("networkidle")
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [page_file.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    beyond = (
        "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1).length"
    )
    if media == "screen":
        assert page.evaluate(beyond) == 0
    assert page.evaluate("document.images.length") >= 12
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    shown = "selector => [...document.querySelectorAll(selector)].filter(e => getComputedStyle(e).display !== 'none').length"
    moving, still = page.evaluate(shown, "img.clip"), page.evaluate(shown, "img.still")
    assert (moving, still) == ((4, 0) if media == "screen" else (0, 4))  # paper does not move
    assert page.evaluate(shown, "nav") == (media == "screen")
    page.close()


def test_words_are_large_enough_for_a_phone(browser, page_file):
    page = browser.new_page(viewport={"width": 390, "height": 850})
    page.goto(page_file.as_uri())
    sizes = page.evaluate(
        "[...document.querySelectorAll('p, td, th, figcaption, a')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 14
    page.close()


def test_links_lead_to_their_sections(browser, page_file):
    page = browser.new_page()
    page.goto(page_file.as_uri())
    for link in page.query_selector_all("nav a"):
        link.click()
        name = link.get_attribute("href")
        assert page.evaluate("name => document.querySelector(name).getBoundingClientRect().top < innerHeight", name)
    page.close()


def test_it_is_printed_on_pages(browser, page_file):
    page = browser.new_page()
    page.goto(page_file.as_uri())
    printed = page.pdf(format="A4")
    assert printed.startswith(b"%PDF") and printed.count(b"/Type /Page\n") + printed.count(b"/Type /Page ") >= 2
    page.close()

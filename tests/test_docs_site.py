"""The documentation site: every page is in it, with pictures and the API. ``make docs`` builds it with warnings as errors."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("sphinx")
pytest.importorskip("myst_parser")
pytest.importorskip("furo")
DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(out / "trees")]
    done = subprocess.run([*command, str(DOCS), str(out / "html")], capture_output=True, text=True, timeout=280)
    assert (done.returncode, done.stderr) == (0, "")
    return out / "html"


class Links(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.found += [given[name] for name in ("src", "href") if given.get(name)]


def test_every_page_is_built_and_listed(site):
    index = (site / "index.html").read_text()
    for page in DOCS.rglob("*.md"):
        target = page.relative_to(DOCS).with_suffix(".html").as_posix()
        assert (site / target).is_file()
        assert target == "index.html" or f'href="{target}"' in index


def test_links_and_pictures_are_there(site):
    for page in site.rglob("*.html"):
        for link in Links(page.read_text()).found:
            path = link.split("#")[0].split("?")[0]
            if path and not re.match(r"(https?|data|mailto):", link):
                assert (page.parent / path).exists(), (page.name, link)
    assert list((site / "_images").glob("*.svg"))


def test_the_api_has_what_people_use(site):
    api = (site / "reference" / "api.html").read_text()
    for name in (
        "QuestionAnswerer.ask",
        "QuestionAnswerer.share",
        "Question",
        "certify",
        "VecVetoAction",
        "QACallback",
        "QAPolicyMixin",
        "hub.package",
        "zoo.VecVetoAction",
        "vector.VetoAction",
        "brier",
    ):
        assert re.search(rf'id="sb3_qa\.[\w.]*{re.escape(name)}"', api), name

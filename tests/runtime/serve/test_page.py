"""The page in a browser (chromium), over the real server and a model that follows a script."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("httptools")
pytest.importorskip("starlette")
playwright = pytest.importorskip("playwright.sync_api")
from served import Serving, scripted, serving  # noqa: E402

from gguf_run.runtime.serve import page as page_module  # noqa: E402
from gguf_run.runtime.serve.server import Access  # noqa: E402

Page = Any  # of playwright
expect = playwright.expect
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
QUIET = ("background-networking", "component-update", "sync")  # a browser speaks to nobody by itself
ARGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", *(f"--disable-{name}" for name in QUIET)]
WAIT_MS = 10_000
COUNT = " ".join(map(str, range(2000)))
HOSTILE = """<script>hit = 1</script> <img src=x onerror="hit = 1"> <b onclick="hit = 1">bold</b> <i>i</i>
[link](javascript:hit=1) [data](data:text/html,<script>hit=1</script>) ![picture](http://evil.invalid/a.png)

<iframe src="http://evil.invalid"></iframe><style>@import "http://evil.invalid/x.css";</style>

<svg onload="hit = 1"><form action="http://evil.invalid"><input name="key"></form></svg>

```html" onmouseover="hit=1
<img src=http://evil.invalid/b.png onerror="hit = 1">
```
"""
WIDE = f"{'w' * 100}\n\n```py\n{'x = ' * 30}1\n```\n\n|{'head|' * 8}\n|{'-|' * 8}\n|{'a long cell|' * 8}\n"
THINK = "<think>Let me see.</think>\n\n| a | b |\n|-|-:|\n| 1 | 2 |\n\n```python\nx = None\n```"
ANSWERS = {"count": COUNT, "hostile": HOSTILE, "wide": WIDE, "think": THINK}


class Script:
    """Says "You said TEXT" of the last message; keeps the prompts."""

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def __call__(self, prompt: str) -> str:
        self.prompts.append(prompt)
        said = prompt.rsplit("<|im_start|>user\n")[-1].partition("<|im_end|>")[0]
        return ANSWERS.get(said, f"You said {said}")


@pytest.fixture(scope="module")
def script() -> Script:
    return Script()


@pytest.fixture(scope="module")
def server(script: Script) -> Iterator[Serving]:
    with serving(scripted(script, n_ctx=16384, delay_s=0.0005)) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=ARGS, timeout=30_000)
        expect.set_options(timeout=WAIT_MS)
        yield browser
        browser.close()


@pytest.fixture
def page(server: Serving, browser: Any) -> Iterator[Page]:
    """A page of a browser that is new. It must not fail, and must ask nobody but the server."""
    errors: list[str] = []
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    context.set_default_timeout(WAIT_MS)
    context.on("request", lambda request: request.url.startswith((server.url, "blob:")) or errors.append(request.url))
    page = context.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: message.type == "error" and errors.append(message.text))
    page.goto(server.url)
    expect(page.locator("#model")).to_have_value("m0")
    yield page
    context.close()
    assert not errors


def ask(page: Page, text: str) -> None:
    """Send a message, and wait for the whole answer."""
    page.fill("#input", text)
    page.keyboard.press("Enter")
    expect(page.locator("article .speed").last).to_contain_text("prompt:")


def messages(page: Page) -> list[str]:
    return page.locator("article .content").all_inner_texts()  # type: ignore[no-any-return]


def in_settings(page: Page, **values: str) -> None:
    page.click("#open")
    for name, value in values.items():
        page.fill(f"#{name}", value)
    page.click("#settings [aria-label=Close]")


def test_files() -> None:
    """The files need no key. They are looked up by name, and nothing else of the disk is."""
    with serving(scripted(n_ctx=64), access=Access(keys=["secret"])) as locked, httpx.Client() as client:
        start = client.get(locked.url)
        assert client.get(f"{locked.url}/v1/models").status_code == 401
        for name, (content, headers) in page_module.files().items():
            got = client.get(f"{locked.url}/page/{name}")
            assert (got.content, got.headers["content-type"]) == (content, headers["content-type"])
            policy, again = got.headers["content-security-policy"], {"if-none-match": got.headers["etag"]}
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert client.get(f"{locked.url}/page/{name}", headers=again).status_code == 304
        for name in ("../page.py", "..%2fpage.py", "%2e%2e/page.py", "/etc/passwd", "vendor", "", "app.js/"):
            assert client.get(f"{locked.url}/page/{name}", headers={"x-api-key": "secret"}).status_code == 404
    assert start.content == page_module.files()["index.html"][0]
    named = set(re.findall(r'(?:src|href)="page/([^"]+)"', start.text))
    assert named <= page_module.files().keys()


@needs_browser
def test_chat(page: Page, script: Script) -> None:
    """Messages are sent with those above them; editing and answering anew make branches, which stay."""
    in_settings(page, system="Be brief.")
    ask(page, "one")
    ask(page, "two")
    assert messages(page) == ["one", "You said one", "two", "You said two"]
    assert [text in script.prompts[-1] for text in ("Be brief.", "You said one", "two")] == [True] * 3
    page.locator("article", has_text="one").first.hover()
    page.locator("article [title=Edit]").first.click()
    page.fill(".edit textarea", "three")
    page.click(".edit .primary")
    expect(page.locator("article .speed").last).to_contain_text("prompt:")
    assert messages(page) == ["three", "You said three"]
    assert "one" not in script.prompts[-1]
    page.click("[title='Answer again']")
    expect(page.locator("article .tools").last).to_contain_text("2/2")
    expect(page.locator("article .speed").last).to_contain_text("prompt:")
    page.reload()
    expect(page.locator("article .content").last).to_have_text("You said three")
    expect(page.locator("article .tools").last).to_contain_text("2/2")
    page.locator("article").first.hover()
    page.locator("[title='Previous version']").first.click()
    assert messages(page) == ["one", "You said one", "two", "You said two"]
    expect(page.locator("#context")).to_contain_text("/ 16,384")


@needs_browser
def test_stop(page: Page, server: Serving) -> None:
    """Text is seen while it is made. Stopping ends the work of the server too, and what has come stays."""
    page.fill("#input", "count")
    page.keyboard.press("Enter")
    expect(page.locator("article.assistant .content")).to_contain_text("1 2 3")
    expect(page.locator("#send")).to_be_hidden()
    page.keyboard.press("Escape")
    expect(page.locator(".note")).to_have_text(["", "You stopped this answer."])
    text = messages(page)[1]
    assert COUNT.startswith(text)
    assert len(text) < len(COUNT)
    page.reload()
    expect(page.locator("article.assistant .content")).to_have_text(text)
    for _ in range(100):
        if not server.model.engine.jobs:
            break
        page.wait_for_timeout(50)
    assert not server.model.engine.jobs


@needs_browser
def test_markdown(page: Page) -> None:
    """Thoughts are folded, tables and code are drawn."""
    ask(page, "think")
    answer = page.locator("article.assistant")
    expect(answer.locator(".reasoning .plain")).to_be_hidden()
    answer.locator(".reasoning summary").click()
    expect(answer.locator(".reasoning .plain")).to_have_text("Let me see.")
    assert answer.locator("td[align=right]").inner_text() == "2"
    expect(answer.locator("pre .hljs-literal")).to_have_text("None")
    expect(answer.locator("[title='Copy code']")).to_be_visible()


@needs_browser
def test_hostile_text(page: Page) -> None:
    """Nothing of what a model writes runs or is loaded; the fixture sees requests and what the policy forbids."""
    ask(page, "hostile")
    page.locator("article.assistant pre").hover()
    content = page.locator("article.assistant .content")
    assert content.locator("script, img, iframe, style, svg:not(button svg), form, input").count() == 0
    assert content.evaluate("e => [...e.querySelectorAll('*')].flatMap(e => e.getAttributeNames())"
                            ".filter(name => name.startsWith('on'))") == []  # fmt: skip
    links = content.locator("a[href]").evaluate_all("links => links.map(link => [link.href, link.rel])")
    assert links == [["http://evil.invalid/a.png", "noopener noreferrer nofollow"]]
    assert page.evaluate("typeof hit") == "undefined"
    assert '<img src=x onerror="hit = 1">' in content.inner_text()


@needs_browser
def test_export_and_import(page: Page, tmp_path: Path) -> None:
    """What is exported can be deleted and imported again, with all branches. Other files are refused."""
    ask(page, "first talk")
    page.click("[title='Answer again']")
    expect(page.locator("article .tools").last).to_contain_text("2/2")
    expect(page.locator("article .speed").last).to_contain_text("prompt:")
    page.click("#new")
    ask(page, "other talk")
    rows, kept = page.locator("#conversations a"), tmp_path / "kept.json"
    page.fill("#search", "said FIRST")
    expect(rows).to_have_text(["first talk"])
    page.fill("#search", "")
    page.once("dialog", lambda dialog: dialog.accept("renamed"))
    page.locator("[title=Rename]").first.click()
    expect(rows).to_have_text(["renamed", "first talk"])
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(kept)
    for _ in range(2):
        page.once("dialog", lambda dialog: dialog.accept())
        page.locator("#conversations li").first.hover()
        page.locator("[title=Delete]").first.click()
    expect(rows).to_have_count(0)
    (bad := tmp_path / "bad.json").write_text(kept.read_text().replace('"parent": 0', '"parent": 7'))
    for file, says in ((bad, "one of its conversations is damaged"), (kept, "2 of 2 conversations imported")):
        with page.expect_file_chooser() as chooser:
            page.click("#import")
        chooser.value.set_files(file)
        expect(page.locator("#toast")).to_contain_text(says)
    expect(rows).to_have_text(["renamed", "first talk"])
    rows.last.click()
    expect(page.locator("article .tools").last).to_contain_text("2/2")
    assert messages(page) == ["first talk", "You said first talk"]


@needs_browser
def test_files_of_the_user(page: Page, script: Script, tmp_path: Path) -> None:
    """Text files go with the message, pictures are refused."""
    (notes := tmp_path / "notes.txt").write_text("the secret is 42")
    with page.expect_file_chooser() as chooser:
        page.click("#attach")
    chooser.value.set_files(notes)
    expect(page.locator(".chip")).to_have_text("notes.txt")
    page.evaluate("""() => {
      const data = new DataTransfer();
      data.items.add(new File(["x"], "cat.png", { type: "image/png" }));
      window.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data }));
    }""")
    expect(page.locator("#toast")).to_have_text("cat.png was not attached: the model reads text only.")
    ask(page, "read it")
    assert "notes.txt" in script.prompts[-1]
    assert "the secret is 42" in script.prompts[-1]


@needs_browser
def test_settings(page: Page) -> None:
    """Settings go with the request; a schema shapes the answer."""
    pytest.importorskip("llguidance")
    in_settings(page, temperature="0.5", top_k="7", max_tokens="30", schema='{"enum": ["yes"]}')
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "go")
    body = request.value.post_data_json
    assert [body[name] for name in ("temperature", "top_k", "max_tokens")] == [0.5, 7, 30]
    assert "top_p" not in body
    assert messages(page)[1] == '"yes"'


@needs_browser
def test_keyboard(page: Page, script: Script) -> None:
    """All is done with keys: write two lines, send, answer again, change the settings."""

    def step_to(title: str) -> None:
        for _ in range(40):
            page.keyboard.press("Shift+Tab")
            if page.evaluate("document.activeElement.title") == title:
                return
        raise AssertionError(title)

    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(page.locator("article .content")).to_have_text(["one\ntwo", "You said one\ntwo"], use_inner_text=True)
    expect(page.locator("#send")).to_be_visible()
    step_to("Answer again")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    expect(page.locator("article .tools").last).to_contain_text("2/2")
    expect(page.locator("#send")).to_be_visible()
    step_to("Settings")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.type("Be kind.")
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    ask(page, "three")
    assert "Be kind." in script.prompts[-1]


@needs_browser
def test_look(page: Page) -> None:
    """Dark where the system is, or by the switch; no sideways scrolling on a small screen."""
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(background)
    assert max(map(int, re.findall(r"\d+", dark))) < 50
    page.click("#theme")
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    page.click("#theme")
    page.emulate_media(color_scheme="light")
    page.reload()
    assert page.evaluate(background) == dark
    page.set_viewport_size({"width": 360, "height": 640})
    ask(page, "wide")
    widths = "[document.documentElement, ...document.querySelectorAll('#scroll, #composer, #settings')]"
    for button in ("#menu", "#hide", "#open"):
        page.click(button)
        assert page.evaluate(f"{widths}.every(e => e.scrollWidth <= 360 && e.scrollWidth <= e.clientWidth + 1)")


@needs_browser
def test_key(browser: Any) -> None:
    """The page asks for the key until it is right, and keeps it for the tab."""
    with serving(scripted(n_ctx=512), access=Access(keys=["secret"])) as locked:
        page = browser.new_page()
        page.set_default_timeout(WAIT_MS)
        page.goto(locked.url)
        for key, title in (("wrong", "This server asks for a key"), ("secret", "The server refused this key")):
            expect(page.locator("#refused")).to_have_text(title)
            page.fill("#key", key)
            page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_value("m0")
        page.reload()
        expect(page.locator("#model")).to_have_value("m0")
        ask(page, "hi")
        assert messages(page) == ["hi", "Hello!"]
        page.close()

"""Reading documents: each format to one text with exact spans; what cannot be read is refused or counted, by name."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.errors import CratonError, FileFormatError, StoreError, UnknownName, UsageError
from craton.retrieval.documents import Document
from craton.retrieval.readers import Reading, find_sources
from craton.retrieval.reading import docx_text
from craton.retrieval.reading.html_text import html_content
from craton.retrieval.reading.markdown import markdown

FONT = Path("/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf")


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


def read(*sources: str | Path, reading: Reading | None = None) -> list[Document]:
    return [document for file in find_sources(sources, reading=reading) for document in file.documents()]


def read_one(path: str | Path) -> Document:
    [document] = read(path)
    check_spans(document)
    return document


def check_spans(document: Document) -> None:
    text = document.text
    assert "\r" not in text
    text.encode()  # no half surrogates
    assert all(0 <= page.start <= page.end <= len(text) for page in document.pages)
    starts = [heading.start for heading in document.headings]
    assert starts == sorted(starts)
    assert all(start < len(text) and (not start or text[start - 1] == "\n") for start in starts)


def refusal(path: Path) -> FileFormatError:
    """The error of a named file; the same file in a folder is skipped and counted."""
    with pytest.raises(FileFormatError) as caught:
        read(path)
    assert str(path) in (caught.value.where or "")
    reading = Reading()
    assert read(path.parent, reading=reading) == []
    assert sum(map(len, reading.skipped.values())) == 1
    assert reading.files == 0
    return caught.value


# --- text, Markdown, code ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    ["سلام\nدنیا می‌روم".encode(), "سلام\r\nدنیا می‌روم".encode(), "سلام\rدنیا می‌روم".encode("utf-8-sig")]
    + ["\ufeffسلام\nدنیا می‌روم".encode(encoding) for encoding in ("utf-16-le", "utf-16-be")],
)
def test_text_in_any_unicode_encoding(write, data: bytes) -> None:
    path = write("docs/a.txt", data)
    document = read_one(path)
    assert document.text == "سلام\nدنیا می‌روم"
    assert (document.name, document.title, document.kind) == ("a.txt", "a.txt", "text")
    assert document.metadata == {"kind": "text", "folder": "", "extension": "txt"}


def test_text_is_kept_as_it_stands(write) -> None:
    text = "e\u0301 \x0c\x01\u202eabc\u200f\u2028 end  \n\n"
    assert read_one(write("a.rst", text)).text == text
    assert read_one(write("b.txt", "b" * 9000 + "\0c")).text == "b" * 9000 + "\ufffdc"


def test_markdown_headings(write) -> None:
    text = (
        "---\ntitle: 'Front'\n---\n# One **bold** `code` #\n\ntext\n# not\\# \n```\n# in code\n```\n~~~~\n~~~\n## too\n"
        "~~~~\n"
        "Two\nlines\n===\n\nthree [link](x)\n---\n\n- item\n---\n    # indented\n#hashtag\n###### Six\n| a |\n|---|\n"
    )
    document = read_one(write("a.md", text))
    assert document.text == text
    assert document.title == "Front"
    assert [(heading.level, heading.title) for heading in document.headings] == [
        (1, "One bold code"),
        (1, "not\\#"),
        (1, "Two lines"),
        (2, "three link"),
        (6, "Six"),
    ]
    assert all(text[heading.start :].startswith(("#", "Two", "three")) for heading in document.headings)


def test_the_title_of_markdown_is_its_highest_heading(write) -> None:
    assert read_one(write("a.md", "## Sub\n\n# Main\n")).title == "Main"


def test_python_headings(write) -> None:
    text = "import os\n@cache\ndef first():\n    pass\n\nclass Second:\n    async def third(self): ...\n"
    document = read_one(write("a.py", text))
    assert document.kind == "source"
    assert [(heading.level, heading.title) for heading in document.headings] == [
        (2, "first"),
        (2, "Second"),
        (3, "third"),
    ]
    assert text[document.headings[0].start :].startswith("@cache")


@pytest.mark.parametrize("text", ["def broken(:\n", "(" * 5000, "-" * 50_000 + "1", '"\\d"\nx = 1', "print 'old'"])
def test_python_that_does_not_parse_is_text(write, text: str) -> None:
    assert read_one(write("a.py", text)).text == text


def test_other_code(write) -> None:
    assert read_one(write("a.rs", "fn main() {}")).kind == "source"
    assert read_one(write("a.unknown", "text")).kind == "text"


# --- HTML ----------------------------------------------------------------------------------------------------------

PAGE = """<!DOCTYPE html><html><head><meta charset="utf-8"><title>The &amp; title</title><style>p {}</style></head>
<body class="x"><nav>Menu <a>Home</a></nav><script>var hidden = "<p>script</p>";</script>
<h1>Head<em>ing</em></h1><p>First   para&nbsp;graph,
wrapped &lt;b&gt; &zwnj;&#1587;.<p>Second<br>line <span hidden>secret</span><span style="display: none">secret</span>.
<ul><li>one<li><p>two</p><ol start=3><li>inner</ol><li>four</ul>
<h2>Table</h2><table><caption>Cap</caption><tr><th>A<th>B<tr><td><p>1</p><td></td><td>3</table>
<pre>
def f():
    return 1

x
</pre><div aria-hidden="true">secret</div><noscript>secret</noscript><template>secret</template><!-- secret -->
<article><footer>Kept</footer></article><footer>secret</footer></body></html>"""


def test_html(write) -> None:
    document = read_one(write("a.html", PAGE))
    assert document.title == "The & title"
    assert document.text == (
        "Heading\n\nFirst para graph, wrapped <b> \u200cس.\n\nSecond\nline .\n\n- one\n- two\n  3. inner\n- four\n\n"
        "Table\n\n"
        "Cap\n\nA | B\n1 |  | 3\n\ndef f():\n    return 1\n\nx\n\nKept"
    )
    assert [(heading.level, heading.title) for heading in document.headings] == [(1, "Heading"), (2, "Table")]
    assert document.text[document.headings[1].start :].startswith("Table\n")


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<title>t</title><p>no head or body", "no head or body"),
        ("<head><title>t</title><p>open head", "open head"),
        ("<title>open title<p>text", "text"),
        ("a < b <", "a < b <"),
        ("<p>text <b unfinished", "text"),
        ("<p>text <!-- unfinished", "text"),
        ("<p>text</p><script>unfinished", "text"),
        ("<p>a<svg><title>s</title><path/></svg>b", "ab"),
        ("<div/>still <p/>here", "still\n\nhere"),
        ("<p>a<![if IE]>b<![x[y]]>c", "abc"),
        ("a&#xD800;b&#0;c", "a\ufffdb\ufffdc"),
        ("<pre>\n\n a\n\n</pre>b", "\n a\n\nb"),
        ("<table><tr><td><table><tr><td>in</table><td>out</table>", "in | out"),
        ("<p hidden>a<p>b", "b"),
        ("<h1>a<h2>b", "a\n\nb"),
        ("</p></div></table>x", "x"),
        ("<dl><dt>term<dd>meaning</dl>", "term\nmeaning"),
        ("<button>Go</button><select><option>1</select>text", "text"),
    ],
)
def test_html_as_it_is_written(html: str, text: str) -> None:
    assert html_content(html).text.strip("\n") == text.strip("\n")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ('<meta charset="windows-1256">سلام'.encode("cp1256"), "سلام"),
        ('<meta http-equiv="Content-Type" content="text/html; charset=iso-8859-1">“é”'.encode("cp1252"), "“é”"),
        ('<?xml version="1.0" encoding="Shift_JIS"?><p>日本'.encode("shift_jis"), "日本"),
        ("<p>سلام".encode("utf-16"), "سلام"),
        ('<meta charset="utf-16">سلام'.encode(), "سلام"),
        ('<meta charset="unheard-of">سلام'.encode(), "سلام"),
        ("\ufeff<meta charset=latin1>سلام".encode(), "سلام"),
    ],
)
def test_encodings_of_html(write, data: bytes, text: str) -> None:
    assert read_one(write("a.htm", data)).text == text


@pytest.mark.parametrize(
    "unit", ["<!--", "<a ", "<a x='", "</a ", "<![", "<div>", "<b></i>", "<p>", "<li>", "<td>", "&", "<table>", "<h1>a"]
)
def test_odd_html_takes_linear_time(unit: str) -> None:
    begun = time.process_time()
    html_content("text" + unit * 20_000)
    assert time.process_time() - begun < 3


NAMES = "p div ul li ol table tr td th h1 h2 pre b script nav title head body html br dl dd svg"
TAGS = NAMES.split()
MARKUP = st.sampled_from(
    [f"<{tag}>" for tag in TAGS] + [f"</{tag}>" for tag in TAGS] + [" ", "\n", "a", "ب", "&lt;", "<"]
)


@settings(deadline=None)
@given(st.lists(MARKUP, max_size=40).map("".join))
def test_any_html_gives_exact_headings(html: str) -> None:
    content = html_content(html)
    for heading in content.headings:
        assert not heading.start or content.text[heading.start - 1] == "\n"
        assert content.text[heading.start :].split()[0] in heading.title.split()


@settings(deadline=None)
@given(st.text(st.sampled_from("#=-~`> \n\tab*1.|[]()"), max_size=80))
def test_any_markdown_gives_headings_at_lines(text: str) -> None:
    for heading in markdown(text).headings:
        assert not heading.start or text[heading.start - 1] == "\n"


# --- PDF -----------------------------------------------------------------------------------------------------------


def pdf_bytes(pages: Iterable[list[str]], font: Path | None = None, **information: str) -> bytes:
    fpdf = pytest.importorskip("fpdf")
    made = fpdf.FPDF()
    for key, value in information.items():
        getattr(made, f"set_{key}")(value)
    if font:
        made.add_font("own", fname=str(font))
    for lines in pages:
        made.add_page()
        made.set_font("own" if font else "helvetica", size=12)
        for line in lines:
            if line.startswith("# "):
                line = line.removeprefix("# ")
                made.start_section(line)
            made.cell(text=line, new_x="LMARGIN", new_y="NEXT")
    return bytes(made.output())


def test_pdf(write) -> None:
    pytest.importorskip("pypdf")
    pages = [["# Setup", "Alpha is here.", "It is broken hyphen-", "ated."], [], ["# Usage", "Beta is here."]]
    document = read_one(write("guide/setup.pdf", pdf_bytes(pages, title="The guide", author="Ada")))
    assert (document.title, document.kind) == ("The guide", "pdf")
    assert {"author": "Ada", "pages": 3, "extension": "pdf"}.items() <= document.metadata.items()
    assert [page.number for page in document.pages] == [1, 2, 3]
    shown = [document.text[page.start : page.end] for page in document.pages]
    assert shown == ["Setup\nAlpha is here.\nIt is broken hyphen-\nated.", "", "Usage\nBeta is here."]
    assert document.page_of(document.text.index("Alpha")) == 1
    assert document.page_of(document.text.index("Beta")) == 3
    assert [(heading.title, heading.start) for heading in document.headings] == [
        ("Setup", 0),
        ("Usage", document.text.index("Usage")),
    ]


@pytest.mark.skipif(not FONT.is_file(), reason="needs the font DejaVu Sans")
def test_pdf_in_persian(write) -> None:
    pytest.importorskip("pypdf")
    text = read_one(write("a.pdf", pdf_bytes([["سلام دنیا"]], FONT))).text
    assert set("سلامدنیا") <= set(text)


def encrypted(data: bytes, password: str) -> bytes:
    pypdf = pytest.importorskip("pypdf")
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(data))
    writer.encrypt(password, "owner", algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def test_an_encrypted_pdf_is_refused_unless_its_password_is_empty(write) -> None:
    data = pdf_bytes([["Alpha"]])
    assert read_one(write("open/a.pdf", encrypted(data, ""))).text == "Alpha"
    error = refusal(write("shut/a.pdf", encrypted(data, "secret")))
    assert "password" in error.what
    assert "qpdf" in (error.remedy or "")


def test_a_scanned_pdf_has_no_text_layer(write) -> None:
    pytest.importorskip("pypdf")
    error = refusal(write("a.pdf", pdf_bytes([[], []])))
    assert "no text layer: its 2 pages" in error.what
    assert "ocrmypdf" in (error.remedy or "")


def test_broken_pdfs(write) -> None:
    pytest.importorskip("pypdf")
    data = pdf_bytes([["Alpha " * 5] * 20])
    for number, broken in enumerate([b"%PDF-1.7\n", b"plain text", data[: len(data) // 3], data[:8] + b"\xff" * 500]):
        assert refusal(write(f"{number}/a.pdf", broken)).remedy


def test_a_pdf_with_any_bytes_changed_is_read_or_refused(tmp_path: Path) -> None:
    pytest.importorskip("pypdf")
    data = bytearray(pdf_bytes([["# Setup", "Alpha beta gamma"]], title="t"))
    path = tmp_path / "a.pdf"
    for position in range(0, len(data), max(1, len(data) // 60)):
        changed = bytearray(data)
        changed[position] ^= 0x55
        path.write_bytes(changed)
        with contextlib.suppress(FileFormatError):
            read_one(path)


# --- DOCX ----------------------------------------------------------------------------------------------------------


def docx_bytes(build: Callable[[Any], None]) -> bytes:
    docx = pytest.importorskip("docx")
    document = docx.Document()
    build(document)
    out = io.BytesIO()
    document.save(out)
    return out.getvalue()


def add_report(document: Any) -> None:
    document.core_properties.title, document.core_properties.author = "گزارش", "Ada"
    document.add_heading("Report", 0)
    document.add_heading("Setup", 1)
    document.add_paragraph("First می‌روم.\tTabbed")
    document.add_paragraph("one", style="List Bullet")
    document.add_paragraph("two", style="List Number")
    document.add_heading("Table", 2)
    table = document.add_table(2, 2)
    for cell, text in zip((c for row in table.rows for c in row.cells), ["a", "b", "c\nd", ""], strict=True):
        cell.text = text
    document.add_paragraph("Last.").add_run(" hidden").font.hidden = True


def test_docx(write) -> None:
    document = read_one(write("a.docx", docx_bytes(add_report)))
    assert document.text == (
        "Report\n\nSetup\n\nFirst می‌روم.\tTabbed\n\n- one\n- two\n\nTable\n\na | b\nc d | \n\nLast."
    )
    assert [(heading.level, heading.title) for heading in document.headings] == [
        (1, "Report"),
        (1, "Setup"),
        (2, "Table"),
    ]
    assert (document.title, document.metadata["author"]) == ("گزارش", "Ada")


def with_part(data: bytes, name: str, change: Callable[[bytes], bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.namelist():
            new.writestr(entry, change(old.read(entry)) if entry == name else old.read(entry))
    return out.getvalue()


def test_docx_insertions_and_controls_are_text_and_deletions_are_not(write) -> None:
    def change(xml: bytes) -> bytes:
        added = (
            b"<w:sdt><w:sdtContent><w:p><w:ins><w:r><w:t>inserted</w:t></w:r></w:ins><w:del><w:r><w:delText>gone</w:delText>"
            b"</w:r></w:del></w:p></w:sdtContent></w:sdt>"
        )
        return xml.replace(b"<w:sectPr", added + b"<w:sectPr", 1)

    data = with_part(docx_bytes(lambda document: document.add_paragraph("text")), "word/document.xml", change)
    assert read_one(write("a.docx", data)).text == "text\n\ninserted"


def test_a_zip_bomb_is_refused_before_it_is_opened(write) -> None:
    plain = docx_bytes(lambda document: document.add_paragraph("text"))
    bomb = with_part(plain, "word/document.xml", lambda xml: b" " * (300 << 20))
    tracemalloc.start()
    error = refusal(write("a.docx", bomb))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "unpacks to more" in error.what
    assert peak < 20 << 20


def test_a_zip_bomb_whose_directory_lies_is_refused(write) -> None:
    plain = docx_bytes(lambda document: document.add_paragraph("text"))
    size = 40 << 20
    bomb = with_part(plain, "word/document.xml", lambda xml: b" " * size)
    lying = bomb.replace(size.to_bytes(4, "little"), (1000).to_bytes(4, "little"))
    assert lying != bomb
    tracemalloc.start()
    refusal(write("a.docx", lying))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20


def test_a_docx_with_entities_is_refused(write) -> None:
    plain = docx_bytes(lambda document: document.add_paragraph("text"))
    evil = b'<?xml version="1.0"?><!DOCTYPE w [<!ENTITY x SYSTEM "file:///etc/hostname">]>'
    data = with_part(plain, "word/document.xml", lambda xml: evil + xml.partition(b"?>")[2].replace(b"text", b"&x;"))
    assert "document type" in refusal(write("a.docx", data)).what


def test_many_parts_are_refused(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docx_text, "MAX_ENTRIES", 3)
    assert "parts" in refusal(write("a.docx", docx_bytes(add_report))).what


@pytest.mark.parametrize("data", [b"PK\x03\x04 no archive", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1old", b"text"])
def test_what_is_no_docx(write, data: bytes) -> None:
    pytest.importorskip("docx")
    assert refusal(write("a.docx", data)).remedy


def test_images_are_not_unpacked(write) -> None:
    data = docx_bytes(add_report)
    out = io.BytesIO(data)
    with zipfile.ZipFile(out, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/media/image1.png", b"\0" * (8 << 20))
    assert read_one(write("a.docx", out.getvalue())).text.startswith("Report")


@pytest.mark.parametrize(("library", "name"), [("pypdf", "a.pdf"), ("docx", "a.docx")])
def test_a_missing_library_is_named(write, monkeypatch: pytest.MonkeyPatch, library: str, name: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UsageError) as caught:
        read(write(name, b"%PDF-1.7"))
    assert caught.value.remedy == "pip install 'craton[retrieve]'"


# --- records -------------------------------------------------------------------------------------------------------


def test_records(write) -> None:
    long = "x" * 300
    rows = [
        {"text": "سلام", "lang": "fa", "n": 3, "long": long},
        {"question": "Why?", "tags": ["a", 1], "in": {"k": None}, "no": None},
    ]
    path = write("data/faq.jsonl", "\n".join(json.dumps(row) for row in [rows[0], {}, rows[1]]))
    first, second = read(path)
    assert (first.name, first.text, first.kind) == ("faq.jsonl:1", "سلام", "record")
    assert first.metadata == {"kind": "record", "folder": "", "extension": "jsonl", "lang": "fa", "n": 3}
    assert (second.name, second.title) == ("faq.jsonl:3", "Why?")
    assert second.text == 'question: Why?\ntags: a, 1\nin: {"k": null}'


def test_tables(write) -> None:
    path = write("data/faq.csv", 'question,answer\nWhy?,"two\nlines"\nHow?,so\n')
    documents = read(path.parent)
    assert [document.name for document in documents] == ["data/faq.csv:2", "data/faq.csv:4"]
    assert documents[0].text == "question: Why?\nanswer: two\nlines"
    assert documents[0].metadata["folder"] == "data"


def test_half_surrogates_in_records_are_refused_and_nul_is_replaced(write) -> None:
    assert "surrogate" in refusal(write("d/a.jsonl", '{"text": "a\\ud800b"}')).what
    assert read_one(write("a.jsonl", '{"text": "a\\u0000b", "k": "\\u0000"}')).text == "a\ufffdb"


def test_a_damaged_table_in_a_folder_keeps_what_came_before(write) -> None:
    path = write("d/a.jsonl", '{"text": "one"}\n{broken\n')
    with pytest.raises(FileFormatError, match="JSON"):
        read(path)
    reading = Reading()
    assert [document.text for document in read(path.parent, reading=reading)] == ["one"]
    assert reading.skipped == {"damaged after 1 record": ["d/a.jsonl"]}


# --- files, folders, patterns --------------------------------------------------------------------------------------


def test_folders_in_order_with_what_they_skip(write, tmp_path: Path) -> None:
    write("docs/b.txt", "b")
    write("docs/a/z.md", "# z")
    write("docs/.hidden", "x")
    write("docs/.git/config", "x")
    write("docs/empty.txt", "")
    write("docs/blank.txt", " \n")
    write("docs/photo.png", b"\x89PNG\0\0")
    write("docs/latin.txt", "é".encode("latin-1"))
    (tmp_path / "docs/loop").symlink_to(tmp_path / "docs")
    (tmp_path / "docs/again.txt").symlink_to(tmp_path / "docs/b.txt")
    (tmp_path / "docs/gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "docs/pipe")
    reading = Reading()
    documents = read(tmp_path / "docs", reading=reading)
    assert [document.name for document in documents] == ["docs/a/z.md", "docs/again.txt"]
    assert documents[0].metadata["folder"] == "docs/a"
    assert (reading.files, reading.documents) == (2, 2)
    assert {reason: sorted(names) for reason, names in reading.skipped.items()} == {
        "hidden": ["docs/.git", "docs/.hidden"],
        "empty": ["docs/blank.txt", "docs/empty.txt"],
        "binary": ["docs/photo.png"],
        "not UTF-8": ["docs/latin.txt"],
        "given twice": [str(tmp_path / "docs/b.txt")],
    }


def test_names_begin_with_what_was_given(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("one/guide/a.txt", "1")
    write("two/guide/a.txt", "2")
    monkeypatch.chdir(tmp_path)

    def names(*sources: str | Path) -> list[str]:
        return [file.name for file in find_sources(sources)]

    assert names("one/guide") == names(tmp_path / "one/guide/") == ["guide/a.txt"]
    assert names("one/guide/a.txt") == ["a.txt"]
    assert names("one/**/*.txt") == ["one/guide/a.txt"]
    assert names("one/guide", "two/guide") == ["guide/a.txt", "two/guide/a.txt"]
    assert names("one", "one/guide/a.txt") == ["one/guide/a.txt"]
    assert names(".") == ["one/guide/a.txt", "two/guide/a.txt"]
    assert names("*/guide/a.txt") == ["one/guide/a.txt", "two/guide/a.txt"]


def test_sources_that_are_not_there(write, tmp_path: Path) -> None:
    write("setup.md", "# x")
    with pytest.raises(UsageError, match=r"there is no file.*setp.md") as caught:
        read(tmp_path / "setp.md")
    assert "setup.md" in (caught.value.remedy or "")
    with pytest.raises(UsageError, match="no file matches"):
        read(tmp_path / "*.pdf")
    with pytest.raises(UsageError, match="does not exist"):
        read(tmp_path / "no/such.md")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="neither"):
        read(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "no text"),
        (b" \n\t", "no text"),
        (b"\xef\xbb\xbf", "no text"),
        (b"a\0b", "binary"),
        (b"\xff\xfe\0\0a\0\0\0", "binary"),
        (b"caf\xe9", "no UTF-8"),
        ("\ufeffab".encode("utf-16-le")[:-1], "utf-16"),
    ],
)
def test_files_without_text(write, data: bytes, what: str) -> None:
    assert what in refusal(write("d/a.txt", data)).what


def test_an_html_page_or_table_without_text(write) -> None:
    assert "no text" in refusal(write("a/a.html", "<script>x</script>")).what
    assert "no records" in refusal(write("b/a.csv", "a,b\n")).what
    assert "no text" in refusal(write("c/a.csv", "a,b\n,\n")).what


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.html", "a.py", "a.pdf", "a.docx", "a.jsonl"])
def test_a_sparse_file_of_500_mb_is_refused_at_once(tmp_path: Path, name: str) -> None:
    path = tmp_path / "d" / name
    path.parent.mkdir()
    with path.open("wb") as file:
        file.write(b"a")
        file.truncate(500_000_000)
    tracemalloc.start()
    error = refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (200 << 20 if name == "a.jsonl" else 16 << 20)  # readers are imported here as well
    assert error.remedy


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(write) -> None:
    path = write("d/a.txt", "x")
    path.chmod(0)
    with pytest.raises(StoreError):
        read(path)
    reading = Reading()
    assert read(path.parent, reading=reading) == []
    assert reading.skipped == {"unreadable": ["d/a.txt"]}


def test_a_file_that_goes_away_is_skipped(write) -> None:
    path = write("d/a.txt", "x")
    reading = Reading()
    [file] = find_sources([path.parent], reading=reading)
    path.unlink()
    assert list(file.documents()) == []
    assert reading.skipped == {"unreadable": ["d/a.txt"]}


def test_digests_are_of_the_bytes(write) -> None:
    path = write("a.txt", "x\r\n")
    [file] = find_sources([path])
    assert file.digest == hashlib.sha256(b"x\r\n").hexdigest()


def test_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt")).write_text("x")
    assert [document.name for document in read(folder)] == ["d/caf\ufffd.txt"]


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=200), st.sampled_from(["txt", "md", "html", "py", "jsonl", "csv", "json", "docx", "pdf"]))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes, extension: str) -> None:
    path = tmp_path_factory.mktemp("any") / f"a.{extension}"
    path.write_bytes(data)
    with contextlib.suppress(CratonError):
        for document in read(path):
            check_spans(document)


# --- packages ------------------------------------------------------------------------------------------------------


def by_name(source: str) -> dict[str, Document]:
    documents = read(source)
    found = {document.name: document for document in documents}
    assert len(found) == len(documents)
    return found


def test_docstrings_of_a_module() -> None:
    found = by_name("package:bisect")
    insort = found["package:bisect#bisect.insort_right"]
    assert insort.text.startswith("bisect.insort_right(a, x, lo=0, hi=None, *, key=None)\n\nInsert item x in list a")
    assert (insort.title, insort.kind) == ("bisect.insort_right", "docstring")
    assert insort.metadata == {
        "kind": "docstring",
        "module": "bisect",
        "qualname": "insort_right",
        "symbol": "function",
    }


def test_docstrings_of_a_package_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = set(sys.modules)
    found = by_name("package:json")
    assert {"package:json#json.dumps", "package:json#json.decoder.JSONDecoder.decode", "package:json#json"} <= set(
        found
    )
    assert found["package:json#json.decoder.JSONDecoder.decode"].text.startswith("json.decoder.JSONDecoder.decode(s, ")
    assert found["package:json#json.decoder.JSONDecoder"].text.startswith(
        "json.decoder.JSONDecoder(*, object_hook=None, "
    )
    assert by_name("package:xmlrpc.client")
    assert not {name for name in set(sys.modules) - imported if name.startswith(("xmlrpc", "json."))}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("package:math", "package:math#math.sqrt"),
        ("package:itertools", "package:itertools#itertools.chain"),
        ("package:_bisect", "package:_bisect#_bisect.insort_right"),
        ("package:collections", "package:collections#collections.deque"),
        ("package:os", "package:os#os.remove"),
        ("package:shutil", "package:shutil#shutil.rmtree"),
        ("package:concurrent.futures", "package:concurrent.futures#concurrent.futures.Future.result"),
    ],
)
def test_docstrings_from_c_and_from_private_modules(source: str, name: str) -> None:
    assert name in by_name(source)


def test_a_package_is_never_run(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("trap/__init__.py", 'raise SystemExit\nfrom ._inner import *\nfrom .sub import shown as other\n"""no doc"""')
    write("trap/_inner.py", 'def shown(a, /, b: int = 1, *c) -> str:\n    """Shown."""\ndef _hidden():\n    """x"""')
    write(
        "trap/sub.py",
        'class A:\n    "A."\n    @property\n    def p(self): "P."\n    @staticmethod\n    def s(x): "S."',
    )
    write("trap/broken.py", "def (:")
    write("trap/latin.py", b"# \xe9")
    monkeypatch.syspath_prepend(tmp_path)
    found = by_name("package:trap")
    assert {document.text for document in found.values()} == {
        "trap.shown(a, /, b: int=1, *c) -> str\n\nShown.",
        "trap.sub.A\n\nA.",
        "trap.sub.A.p\n\nP.",
        "trap.sub.A.s(x)\n\nS.",
    }
    [first, *_] = find_sources(["package:trap"])
    before = first.digest
    write("trap/_inner.py", 'def shown():\n    """Changed."""')
    [first, *_] = find_sources(["package:trap"])
    assert first.digest != before


def test_packages_that_are_not_there() -> None:
    with pytest.raises(UnknownName, match="shutill") as caught:
        read("package:shutill")
    assert "shutil" in (caught.value.remedy or "")
    for name in ("package:", "package:a b", "package:../x"):
        with pytest.raises(UsageError):
            read(name)

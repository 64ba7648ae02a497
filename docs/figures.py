"""Write the tables of saved results into the documents: `python docs/figures.py`, after `make figures` has measured.

Between `<!-- tables of figures/NAME.json -->` and `<!-- end -->` stands what `ktlsd bench --from docs/figures/NAME.json
--markdown -` prints. tests/unit/test_docs.py holds the documents to it.
"""

import re
from pathlib import Path

import msgspec

from ktlsd.bench import report_markdown
from ktlsd.bench.result import Result

HERE = Path(__file__).parent
_MARKED = re.compile(r"(<!-- tables of (figures/[\w.-]+\.json) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """Return a document with the tables of the results it names."""

    def table(match: re.Match[str]) -> str:
        result = msgspec.json.decode((HERE / match[2]).read_bytes(), type=Result)
        return f"{match[1]}{report_markdown.render(result)}{match[4]}"

    return _MARKED.sub(table, text)


if __name__ == "__main__":
    for document in HERE.glob("*.md"):
        text = document.read_text()
        if filled(text) != text:
            document.write_text(filled(text))
            print(f"{document.name}: new tables")

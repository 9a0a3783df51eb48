"""A self-contained HTML page and its pieces: style, tables, pictures as data.

Every function escapes the texts it is given and returns HTML.
"""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from harma_ray.evaluation import Section
from harma_ray.files import write_bytes

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_SHORT = 24
"""Letters of a text that is never broken into lines."""
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1e22; --faint: #656c75; --rule: #dcdfe3; --page: #fff; --card: #f5f6f8;
  --right: #168c3c; --equal: #1e64dc; --wrong: #cd3c32; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6e9; --faint: #9aa1aa; --rule: #363b42; --page: #16181b;
  --card: #202327; --right: #3fbf68; --equal: #6ea0ff; --wrong: #e8766d; } }
body { margin: 0 auto; max-width: 1080px; padding: 24px 20px 60px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 40px 0 10px; }
h3 { font-size: 15px; margin: 24px 0 8px; } p { margin: 6px 0; max-width: 76ch; } .faint { color: var(--faint); }
nav { display: flex; flex-wrap: wrap; gap: 4px 14px; } nav a { color: inherit; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 12px; border-bottom: 1px solid var(--rule); text-align: right; vertical-align: top; }
th { font-weight: 600; color: var(--faint); } td { white-space: nowrap; }
td.text, th.text { text-align: left; white-space: normal; } td.short { white-space: nowrap; }
th.group { text-align: left; color: var(--ink); } .edge { padding-left: 32px; }
tr.sum td { font-weight: 600; } code { font-size: 13px; }
.picture { box-sizing: border-box; max-width: 100%; height: auto; background: #fff;
  border: 1px solid var(--rule); border-radius: 6px; }
.failure { display: flex; gap: 18px; padding: 12px 14px; margin: 10px 0; background: var(--card); border-radius: 8px; }
.query { flex: 0 0 250px; overflow-wrap: anywhere; } .found { flex: 1; min-width: 0; display: flex; flex-wrap: wrap;
  gap: 8px; align-content: flex-start; } .query p, .captions p { margin: 0 0 4px; }
figure { margin: 0; font-size: 12px; text-align: center; color: var(--faint); }
figure img, .query img { width: 96px; height: 96px; object-fit: contain; box-sizing: border-box; display: block; }
figure img { border: 1px solid var(--wrong); } .right img { border: 4px solid var(--right); }
.equal img { border: 4px solid var(--equal); } .own { padding-right: 12px; border-right: 1px solid var(--rule); }
.captions { flex: 1; min-width: 0; overflow-wrap: anywhere; } .captions .right { color: var(--right); }
.captions .equal { color: var(--equal); } .score { color: var(--faint); font-size: 12px; margin-right: 8px; }
hr { border: 0; border-top: 1px solid var(--rule); margin: 4px 0; }
summary { cursor: pointer; margin: 6px 0; } details { overflow-wrap: anywhere; }
@media (max-width: 700px) { body { padding: 16px 12px 40px; }
  .failure { flex-direction: column; } .query { flex: none; } th { white-space: nowrap; }
  table { font-size: 13px; } th, td { padding: 4px 6px; } td.text { min-width: 16ch; } td.short { min-width: 0; }
  tr > :first-child { position: sticky; left: 0; background: var(--page); } .edge { padding-left: 14px; }
  .picture { max-width: none; width: 760px; } }
"""


def write_page(folder: Path, name: str, title: str, subtitle: str, sections: Sequence[Section]) -> Path:
    """Writes a page that opens without a network, and beside it the pictures of its sections.

    Args:
        folder: Where to write; made if missing.
        name: Name of the file.
        title: Heading of the page.
        subtitle: What it is about.
        sections: Its parts, to which links lead.

    Returns:
        Path of the page.

    Raises:
        UserError: If the folder cannot be written.
    """
    links = "".join(f'<a href="#{escape(part.name)}">{escape(part.title)}</a>' for part in sections)
    parts = [f'<h2 id="{escape(part.name)}">{escape(part.title)}</h2>\n{part.html}' for part in sections]
    text = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{paragraph(subtitle)}\n<nav>{links}</nav>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )
    pictures = {picture: data for part in sections for picture, data in part.pictures.items()}
    for file, data in {**pictures, name: text.encode()}.items():
        write_bytes(folder / file, data)
    return folder / name


def folded(summary: str, content: str) -> str:
    """Returns HTML that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>\n{content}\n</details>"


def subsection(title: str) -> str:
    """Returns a smaller heading."""
    return f"<h3>{escape(title)}</h3>"


def paragraph(text: str) -> str:
    """Returns a paragraph in a faint colour."""
    return f'<p class="faint">{escape(text)}</p>'


def command(text: str) -> str:
    """Returns a command to copy."""
    return f"<p><code>{escape(text)}</code></p>"


def table(
    columns: Sequence[tuple[str, Sequence[str]]],
    *,
    num_text_columns: int,
    groups: Sequence[tuple[str, int]] = (),
    sum_row: bool = False,
) -> str:
    """Returns a table.

    Args:
        columns: Titles and cells; those after the first `num_text_columns` are aligned to the right.
        num_text_columns: Columns of text.
        groups: Titles over the columns that follow the text, and how many columns each has.
        sum_row: Whether the last row is a sum.
    """
    edges = {num_text_columns + sum(size for _, size in groups[:i]) for i in range(len(groups))}
    kinds = ["text" if i < num_text_columns else "edge" if i in edges else "" for i in range(len(columns))]
    lines = ['<div class="scroll"><table>']
    if groups:
        cells = "".join(f'<th class="group edge" colspan="{size}">{escape(title)}</th>' for title, size in groups)
        lines.append(f'<tr><th colspan="{num_text_columns}"></th>{cells}</tr>')
    lines.append(_row("th", [title for title, _ in columns], kinds))
    rows = list(zip(*[cells for _, cells in columns], strict=True))
    for number, row in enumerate(rows):
        is_sum = sum_row and number == len(rows) - 1
        lines.append(_row("td", row, kinds, ' class="sum"' if is_sum else ""))
    return "\n".join([*lines, "</table></div>"])


def _row(tag: str, cells: Iterable[str], kinds: Sequence[str], attributes: str = "") -> str:
    content = ""
    for cell, kind in zip(cells, kinds, strict=True):
        is_short = kind == "text" and len(cell) <= _SHORT  # stays on one line on a narrow screen: the table scrolls
        name = f' class="{kind}{" short" if is_short else ""}"' if kind else ""
        content += f"<{tag}{name}>{escape(cell)}</{tag}>"
    return f"<tr{attributes}>{content}</tr>"


def picture(png: bytes, description: str) -> str:
    """Returns a PNG file as an image of the page."""
    return f'<div class="scroll"><img class="picture" alt="{escape(description)}" src="{data_uri(png, "png")}"></div>'


def data_uri(data: bytes, kind: str) -> str:
    """Returns an image file as an address that holds it; `kind` is ``png`` or ``jpeg``."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"

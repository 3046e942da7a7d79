"""report.html: what a run did on one page that needs nothing else, not even a network."""

import base64
import html
from pathlib import Path

PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 0 auto; padding: 1rem }}
  body {{ color: #1e1e1e; background: #fff }}
  h1, h2 {{ line-height: 1.2 }}
  pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f3f3f3; padding: .5rem }}
  .wide {{ overflow-x: auto }}
  table {{ border-collapse: collapse }}
  td, th {{ padding: .2rem .8rem .2rem 0; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }}
  td:first-child, th:first-child {{ text-align: left }}
  .charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1rem }}
  .pictures {{ display: flex; flex-wrap: wrap; gap: 1rem }}
  figure {{ margin: 0; max-width: 100% }}
  img, svg {{ max-width: 100%; height: auto }}
  figcaption {{ font-weight: bold }}
</style>
<h1>{title}</h1>
{body}
</html>
"""
WIDTH, HEIGHT, LEFT, BOTTOM = 320, 200, 44, 22  # of a chart, px; its margins
WORDS = {"train": "train", "val": "validation", "uninformed": "uninformed guess", "floor": "floor"}
STYLES = {  # of a curve; told apart by more than colour
    "train": 'stroke="#888"',
    "validation": 'stroke="#1f77b4" stroke-width="2.5"',
    "uninformed guess": 'stroke="#b00" stroke-dasharray="5 4"',
    "floor": 'stroke="#080" stroke-dasharray="1 3"',
}


def write_report(file: Path, title: str, parts: list[tuple[str, str]]) -> None:
    """Write the page: parts of (heading, HTML)."""
    body = "\n".join(f"<h2>{html.escape(heading)}</h2>\n{part}" for heading, part in parts)
    file.write_text(PAGE.format(title=html.escape(title), body=body), "utf-8", errors="backslashreplace")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table, all of its cells text."""
    lines = [f"<tr>{''.join(f'<th>{html.escape(cell)}' for cell in head)}"]
    lines += [f"<tr>{''.join(f'<td>{html.escape(cell)}' for cell in row)}" for row in rows]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def preformatted(text: str) -> str:
    """Text as it is."""
    return f"<pre>{html.escape(text)}</pre>"


def pictures(named: dict[str, Path]) -> str:
    """PNG files side by side, within the page; nothing where there are none."""
    figures = []
    for caption, file in named.items():
        source = base64.b64encode(file.read_bytes()).decode()
        figures.append(
            f'<figure><figcaption>{html.escape(caption)}</figcaption><img alt="{html.escape(caption)}" '
            f'src="data:image/png;base64,{source}"></figure>'
        )
    return f'<div class="pictures">{"".join(figures)}</div>' if figures else ""


def charts(history: list[dict], drawn: dict[str, list[str]]) -> str:
    """Curves by epoch.

    history  a row an epoch: `epoch` and figures
    drawn    {title: figures}, whose names begin with `train_`, `val_`, `uninformed_` or `floor_`
    """
    parts = [
        _chart(title, {WORDS[n.split("_")[0]]: [(row["epoch"], row[n]) for row in history] for n in names})
        for title, names in drawn.items()
    ]
    return f'<div class="charts">{"".join(parts)}</div>'


def _chart(title, curves):
    last = max(x for points in curves.values() for x, _ in points)
    top = max(y for points in curves.values() for _, y in points) * 1.05 or 1.0

    def place(x, y):
        across = (x - 1) / max(1, last - 1)
        return LEFT + across * (WIDTH - LEFT - 8), HEIGHT - BOTTOM - min(1.0, y / top) * (HEIGHT - BOTTOM - 8)

    lines = []
    for share in (0, 0.5, 1):
        _, y = place(1, share * top / 1.05)
        lines.append(f'<line x1="{LEFT}" x2="{WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        lines.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{share * top / 1.05:.3g}</text>')
    lines.append(f'<text x="{LEFT}" y="{HEIGHT - 5}">epoch 1</text>')
    lines.append(f'<text x="{WIDTH - 8}" y="{HEIGHT - 5}" text-anchor="end">{last}</text>')
    for word, points in curves.items():
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        dots = "".join(f'<circle cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="2"/>' for p in path.split())
        lines.append(f'<polyline data-curve="{word}" points="{path}" fill="none" {STYLES[word]}/>')
        lines.append(dots if len(points) == 1 else "")
    said = ", ".join(f"{word} {points[-1][1]:.3g}" for word, points in curves.items())
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" font-size="11" role="img" aria-label="{html.escape(title)}: {said}">'
        f"{''.join(lines)}</svg><div>{_legend(curves)}</div></figure>"
    )


def _legend(curves):
    line = '<svg width="26" height="10"><line x1="0" x2="26" y1="5" y2="5" {style}/></svg> {word} {value:.3g}'
    parts = (line.format(style=STYLES[word], word=word, value=points[-1][1]) for word, points in curves.items())
    return " &nbsp; ".join(parts)

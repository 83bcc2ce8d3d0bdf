"""Two plots of a compare page as SVG files for README, light and dark.

    edgekit compare out/... --text stories.txt --reference lfm2-tiny -o compare.html
    python docs/picture.py compare.html

writes `docs/pictures/compare-light.svg` and `compare-dark.svg`: GitHub shows no page's own styles,
and chooses between two files by the reader's theme.
"""

import re
import sys
from pathlib import Path

PLOTS = ("Divergence against bytes", "Prefill")
PLACE = Path(__file__).parent / "pictures"
HEAD, GAP = 40, 24
_VARIABLE = re.compile(r"(--[\w-]+):\s*([^;}]+);")


def picture(page: str, dark: bool) -> str:
    """Return `PLOTS` side by side under their titles, with the colours of one theme."""
    style = page.partition("<style>")[2].partition("</style>")[0]
    light_rules, dark_rules = re.findall(r":root \{([^}]*)\}", style)
    colours = dict(_VARIABLE.findall(light_rules))
    colours |= dict(_VARIABLE.findall(dark_rules)) if dark else {}
    series = {f"--c{index}": colours[f"--c{index}"] for index in range(6)}
    drawn = re.compile(r"svg|\.grid|\.mark|\.line|\.whisker")
    rules = "\n".join(line for line in style.splitlines() if drawn.match(line))
    numbered = "\n".join(f".s{i} {{ --c: {colour}; }}" for i, colour in enumerate(series.values()))
    own = "".join(f"{name}: {value}; " for name, value in colours.items())
    parts, x, height = [], 0.0, 0.0
    for title in PLOTS:
        figure = page.partition(f"<figcaption>{title}")[2].partition("</figure>")[0]
        plot = figure[figure.index("<svg") : figure.rindex("</svg>") + len("</svg>")]
        box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', plot)
        assert box is not None
        wide, high = float(box[1]), float(box[2])
        note = re.search(r'class="soft">([^<]*)', figure)
        parts.append(
            f'<text x="{x + 12}" y="16" style="font-weight:600">{title}</text>'
            f'<text class="tick" x="{x + 12}" y="32">{note[1] if note else ""}</text>'
            + plot.replace("<svg", f'<svg x="{x}" y="{HEAD}" width="{wide}" height="{high}"', 1)
        )
        x, height = x + wide + GAP, max(height, HEAD + high)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {x - GAP} {height}">'
        f"<style>svg {{ {own} }}\n{rules}\n{numbered}</style>"
        f'<rect width="100%" height="100%" fill="var(--card)"/>{"".join(parts)}</svg>\n'
    )


def main() -> None:
    """Write both pictures of the page that is named."""
    page = Path(sys.argv[1]).read_text(encoding="utf-8")
    PLACE.mkdir(exist_ok=True)
    for name, dark in (("light", False), ("dark", True)):
        (PLACE / f"compare-{name}.svg").write_text(picture(page, dark), encoding="utf-8")


if __name__ == "__main__":
    main()

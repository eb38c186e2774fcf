"""The pages of a report: Markdown, and HTML that holds its pictures."""

from __future__ import annotations

import base64
import html
import io
import mimetypes
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import markdown
from PIL import Image

from engine.files import writing
from report.steps import Steps

WIDE = 600  # pixels from which a picture is moved sideways on a phone, rather than shrunk
STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 62em; margin: 1em auto; padding: 0 1em }
table { border-collapse: collapse; font-size: 85% }
td, th { border: 1px solid #bbb; padding: 3px 8px; text-align: left }
pre { background: #f4f4f4; padding: 8px; font-size: 13px; overflow-x: auto }
details { margin: 1em 0 } details pre { white-space: pre-wrap; overflow-wrap: anywhere }
summary { color: #555; cursor: pointer }
blockquote { border-left: 4px solid #bbb; margin-left: 0; padding-left: 1em }
figure { margin: 1em 0; display: flex; flex-wrap: wrap; gap: 4px }
figcaption { color: #444; font-size: 90%; width: 100% }
img { max-width: 100% }
.scroll { max-width: 100%; max-height: 48em; overflow: auto } ul { padding-left: 1.2em }
@media screen { figure img { flex: 0 1 auto; max-width: min(100%, 450px) }
  figure .scroll img { max-width: none } }
@media print { body { font-size: 11px; max-width: none; margin: 0 }
  details:not([open]) { display: none } h1, h2 { break-after: avoid }
  figure, .scroll, pre, blockquote { break-inside: avoid }
  .scroll { max-height: none; overflow: visible } pre { white-space: pre-wrap; font-size: 8px }
  figure img { max-height: 20cm; max-width: 49% } figure .scroll img { max-width: 100% } }
"""


class Page:
    """What a report says so far, and the steps that it rests on."""

    def __init__(self, steps: Steps) -> None:
        self.steps, self.folder = steps, steps.folder
        self.pictures = self.folder / "report"
        self.conclusions: list[str] = []
        self.sections: list[str] = []
        self.failures: list[str] = []  # beside those of the steps

    def add(self, *parts: str) -> None:
        self.sections += parts

    def conclude(self, *sentences: str) -> None:
        """A line for the top of the page."""
        self.conclusions.append(" ".join(sentences))

    def attempt(self, part: Callable[..., Any], *args: object) -> Any:
        """Let `part` add to the page; what fails there is named, and the page goes on after it.

        Returns:
            What the part returns; None where it fails.
        """
        try:
            return part(self, *args)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            title = next(text for text in reversed(self.sections) if text.startswith("#"))
            self.failures.append(f"{title.strip('# ')}: {reason}")
            self.add(f"**What belongs here failed: {reason}.**")
            return None

    def run(self, commands: Mapping[str, list[str]]) -> list[str]:
        """Run and show commands; returns the names of those that succeeded."""
        done = self.steps.run(commands)
        self.show(commands)
        return done

    def show(self, commands: Mapping[str, list[str]]) -> None:
        """The commands, folded, and the last lines of those that have failed."""
        count = "the command" if len(commands) == 1 else f"the {len(commands)} commands"
        self.add(folded(count, fenced("\n".join(map(shlex.join, commands.values())))))
        for name in commands:
            if failure := self.steps.failure(name):
                last = self.steps.log(name).read_text("utf-8", "replace").splitlines()[-5:]
                self.add(f"**{name} {failure}.** It ends with:", fenced("\n".join(last)))

    def write(self) -> None:
        """Write report.md, and with all pictures in it report.html."""
        title, *rest = self.sections
        lines = "\n".join(f"- {line}" for line in self.conclusions)
        text = "\n\n".join([title, *[lines] * bool(lines), *rest]) + "\n"
        with writing(self.folder / "report.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
        body = markdown.markdown(text, extensions=["tables", "fenced_code", "md_in_html"])
        body = re.sub("<table>.*?</table>", r"<div class='scroll'>\g<0></div>", body, flags=re.S)
        shown = r"<p>((?:<img [^>]*>\s*)+)(?:<br ?/?>\s*<em>(.*?)</em>)?</p>"
        caption = r"<figure>\1<figcaption>\2</figcaption></figure>"
        body = re.sub(shown, caption, body, flags=re.S)
        body = re.sub('<img ([^>]*)src="([^"]+)"([^>]*)>', self.embed, body)
        with writing(self.folder / "report.html") as temporary:
            temporary.write_text(
                "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
                "<meta name='viewport' content='width=device-width'>"
                f"<title>Report</title><style>{STYLE}</style></head><body>\n{body}\n</body></html>\n",
                encoding="utf-8",
            )

    def embed(self, match: re.Match[str]) -> str:
        """An image of the page with its file inside; a wide one can be moved sideways."""
        path = self.folder / match[2]
        if not path.is_file():
            return match[0]
        kind, content = mimetypes.guess_type(path)[0], path.read_bytes()
        data = f"data:{kind};base64,{base64.b64encode(content).decode()}"
        image = f'<img {match[1]}src="{data}"{match[3]}>'
        is_wide = path.suffix == ".svg" or Image.open(io.BytesIO(content)).width > WIDE
        return f"<div class='scroll'>{image}</div>" if is_wide else image


def fenced(text: str) -> str:
    return f"```text\n{text}\n```"


def folded(title: str, text: str) -> str:
    """`text` behind its title, which opens it."""
    return f'<details markdown="1">\n<summary>{title}</summary>\n\n{text}\n\n</details>'


def figure(caption: str, pictures: Mapping[str, str]) -> str:
    """Pictures beside each other, where there is room: what each shows, and its file."""
    images = (f"![{alt}](report/{name})" for alt, name in pictures.items())
    return f"{' '.join(images)}  \n*{caption}*"


def quoted(text: str) -> str:
    """A language model's text, its lines ended where it says so."""
    words = html.escape(" ".join(text.split())).replace("&lt;eos&gt;", "<br>")
    return f"<blockquote>{words}</blockquote>"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)

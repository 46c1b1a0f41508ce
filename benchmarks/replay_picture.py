"""The picture of the README: one problem answered by the AR parent and by its conversion, a forward at a time.

    python benchmarks/replay_picture.py docs/images/replay.svg --number 2

An animated SVG from two traces of the models in models/; every token appears with the forward that committed it.
"""

import argparse
from html import escape
from pathlib import Path

import torch

import unmask
from unmask.lab.tasks import problems
from unmask.replay_page import token_pieces
from unmask.sampling import Blocks, Threshold, Trace

ROOT = Path(__file__).resolve().parents[1]
SECONDS, PAUSE = 0.5, 3.0
"""Of a forward, and at the end."""
CHARACTER, LINE, LEFT = 9.6, 30, 16
STYLE = """
text { font: 16px ui-monospace, 'DejaVu Sans Mono', monospace; fill: #1d1d1f; white-space: pre; }
.soft { fill: #6b6b70; } .name { font-family: system-ui, sans-serif; font-weight: 600; }
.new { fill: #0b6bcb; font-weight: 600; } .hidden { fill: #c9c9cf; } .paper { fill: #fff; stroke: #d9d9de; }
@media (prefers-color-scheme: dark) {
  text { fill: #ececf0; } .soft { fill: #a0a0a8; } .new { fill: #6cb4ff; } .hidden { fill: #4a4a52; }
  .paper { fill: #17171a; stroke: #3a3a40; }
}
"""


def traced(folder: str, prompt: str, diffusion: bool) -> tuple[list[str], list[int], int]:
    """The pieces of an answer, the number of the forward that gave each, and all forwards."""
    lm, trace = unmask.load(ROOT / "models" / folder), Trace(Threshold(0.9))
    ids = lm.prompt_ids(prompt)[0].tolist()
    mode = Blocks(select=trace.select) if diffusion else "ar"
    out = lm.generate(prompt, mode, 26, callback=trace.callback)
    new = out.new_tokens(0, len(ids))
    ends = set(lm.end_token_ids)
    pieces = token_pieces(lm.tokenizer, ids, new)
    forward = {guess.position - len(ids): step.number for step in trace.steps for guess in step.commits}
    kept = [i for i, token in enumerate(new) if token not in ends]
    return [pieces[i] for i in kept], [forward[i] for i in kept], int(out.num_forwards[0])


def line_of(pieces: list[str], forward: list[int], x: float, y: float, total: float) -> list[str]:
    """Each token: a dot for its mask until its forward, then its text."""
    marks = []
    for piece, number in zip(pieces, forward, strict=True):
        width, begin = CHARACTER * len(piece), number * SECONDS / total
        shown = f'values="0;0;1;1" keyTimes="0;{begin:.4f};{begin:.4f};1" dur="{total}s" repeatCount="indefinite"'
        masked = shown.replace("0;0;1;1", "1;1;0;0")
        at = f'x="{x:.1f}" y="{y}"'
        marks.append(f'<text {at} class="new">{escape(piece)}<animate attributeName="opacity" {shown}/></text>')
        marks.append(f'<text {at} class="hidden" opacity="0">{"·".rjust(len(piece))}'
                     f'<animate attributeName="opacity" {masked}/></text>')  # fmt: skip
        x += width
    return marks


def counter(forwards: int, x: float, y: float, total: float) -> list[str]:
    """The number of the forward, as it counts."""
    marks = []
    for number in range(1, forwards + 1):
        begin, end = number * SECONDS / total, (number + 1) * SECONDS / total if number < forwards else 1.0
        times = f"0;{begin:.4f};{end:.4f};1" if end < 1 else f"0;{begin:.4f};1"
        values = "0;1;0;0" if end < 1 else "0;1;1"
        word = "forward" if number == 1 else "forwards"
        marks.append(
            f'<text x="{x}" y="{y}" class="soft" opacity="{int(number == forwards)}">{number} {word}<animate '
            f'attributeName="opacity" calcMode="discrete" values="{values}" keyTimes="{times}" dur="{total}s" '
            'repeatCount="indefinite"/></text>'
        )
    return marks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--task", default="chain")
    parser.add_argument("--number", type=int, default=0, help="which problem of the test split")
    options = parser.parse_args()
    torch.set_num_threads(1)
    problem = problems((options.task,), "test", options.number + 1)[options.number]
    ways = {name: traced(folder, problem.prompt, diffusion) for name, folder, diffusion in (
        ("autoregressive parent", "tasks-base", False), ("converted by unmask", "tasks-one-block", True))}  # fmt: skip
    total = SECONDS * max(forwards for _, _, forwards in ways.values()) + PAUSE
    answer = LEFT + CHARACTER * len(problem.prompt)
    width = max(answer + CHARACTER * (sum(map(len, pieces)) + 14) for pieces, _, _ in ways.values())
    marks, y = [], LINE
    for name, (pieces, forward, forwards) in ways.items():
        marks.append(f'<text x="{LEFT}" y="{y}" class="name">{name}</text>')
        marks.append(f'<text x="{LEFT}" y="{y + LINE}" class="soft">{escape(problem.prompt)}</text>')
        marks += line_of(pieces, forward, answer, y + LINE, total)
        marks += counter(forwards, width - 12 * CHARACTER, y, total)
        y += 2 * LINE + 12
        print(f"{name}: {''.join(pieces)!r}, {forwards} forwards")
    body = "\n".join(marks)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {y - 12}" width="{width:.0f}" '
        f'role="img" aria-label="The same answer, token by token and several tokens a forward">\n'
        f"<style>{STYLE}</style>\n"
        f'<rect class="paper" x=".5" y=".5" width="{width - 1:.0f}" height="{y - 13}" rx="8"/>\n'
        f"{body}\n</svg>\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()

"""Draws what each transform of decoding.md does to one real distribution, with the oracle that defines it:

    python docs/figures/draw_transforms.py

writes the SVG files beside this one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pellucid import LLM, SamplingParams
from pellucid.core.batch import sampling_record
from pellucid.decoding.distribution import Logits, probabilities
from pellucid.decoding.pipeline import RowSampling, constrain, warp
from pellucid.tokenizer.tokenizer import Tokenizer

MODEL = "smollm2-135m-instruct"
PROMPT = "The cat sat on the mat."
OUTPUT = " The dog sat on the"

NUM_TOKENS = 12
NUM_COLUMNS = 3
WIDTH, PADDING = 300, 14  # of a panel
HEADER, ROW, FOOTER = 58, 19, 12
LABEL, BAR = 66, 150  # what a row is made of
NUMBER_END = WIDTH - PADDING

STYLE = """
  text { font-family: ui-sans-serif, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; font-size: 12px;
         fill: #1f2328 }
  .name { font-weight: 600; font-size: 13px }
  .value { font-weight: 400; fill: #0a58ca }
  .note, .rest { fill: #636c76 }
  .note { font-size: 11px }
  .number { text-anchor: end; font-variant-numeric: tabular-nums }
  .label { text-anchor: end }
  .gone { fill: #a8b0b9 }
  .before { fill: #dfe4ea }
  .after { fill: #2f6fdb }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .value { fill: #79b4ff }
    .note, .rest { fill: #9198a1 }
    .gone { fill: #59616b }
    .before { fill: #363d47 }
    .after { fill: #4c8dff }
  }
"""


class Panel:
    """One picture: its title, what is set (columns of SAMPLING_DTYPE, biases, banned tokens), and a note."""

    def __init__(
        self,
        name: str,
        value: str,
        *,
        note: str = "",
        bias: Mapping[str, float] | None = None,
        banned: Iterable[str] = (),
        **columns: float,
    ) -> None:
        self.name, self.value, self.note = name, value, note
        self.bias, self.banned, self.columns = bias or {}, banned, columns


FIGURES: dict[str, tuple[Panel, ...]] = {
    "constraints": (
        Panel("logit_bias", "couch +1, bed -2", bias={" couch": 1.0, " bed": -2.0}),
        Panel("repetition_penalty", "1.2", note="all tokens of the text so far", repetition_penalty=1.2),
        Panel(
            "frequency_penalty",
            "0.5, presence_penalty 0.5",
            note="tokens of the output: dog",
            frequency_penalty=0.5,
            presence_penalty=0.5,
        ),
        Panel("dry_multiplier", "0.8", note="mat would repeat “sat on the mat”", dry_multiplier=0.8),
        Panel("banned_token_ids", "bed, floor, moon", banned=(" bed", " floor", " moon")),
        Panel("no_repeat_ngram_size", "4", note="“sat on the mat” again", no_repeat_ngram_size=4),
    ),
    "temperature": (
        Panel("temperature", "0.5", note="sharper", temperature=0.5),
        Panel("temperature", "1.5", note="flatter", temperature=1.5),
        Panel("dynatemp_range", "0.7", note="0.3 to 1.7, by the entropy", dynatemp_range=0.7),
    ),
    "truncation": (
        Panel("top_n_sigma", "2.5", top_n_sigma=2.5),
        Panel("top_k", "3", top_k=3),
        Panel("top_p", "0.6", top_p=0.6),
        Panel("min_p", "0.1", min_p=0.1),
        Panel("typical_p", "0.6", typical_p=0.6),
        Panel("epsilon_cutoff", "0.01", epsilon_cutoff=0.01),
        Panel("eta_cutoff", "0.2", eta_cutoff=0.2),
        Panel("xtc_probability", "1, xtc_threshold 0.1", xtc_probability=1.0, xtc_threshold=0.1),
        Panel(
            "temperature",
            "0.7, top_p 0.9, min_p 0.05",
            temperature=0.7,
            top_p=0.9,
            min_p=0.05,
        ),
    ),
    "mirostat": (
        Panel("mirostat", "1", note="μ = 10 bits", mirostat=1, mirostat_mu=10.0),
        Panel("mirostat", "2", note="μ = 10 bits", mirostat=2, mirostat_mu=10.0),
        Panel("mirostat", "2", note="μ = 6 bits", mirostat=2, mirostat_mu=6.0),
    ),
}


class Drawer:
    """Draws panels of one row of logits."""

    def __init__(self, logits: Logits, prompt: list[int], output: list[int], tokenizer: Tokenizer) -> None:
        self._logits = logits
        self._prompt, self._output = prompt, output
        self._tokenizer = tokenizer
        self._before = probabilities(logits)
        self._top = np.argsort(-self._before, kind="stable")[:NUM_TOKENS]

    def figure(self, panels: Iterable[Panel]) -> str:
        """A grid of panels as SVG."""
        after = [(panel, self._after(panel)) for panel in panels]
        most = max(float(probabilities(logits)[self._top].max()) for _, logits in (*after, (None, self._logits)))
        height = HEADER + ROW * (NUM_TOKENS + 1) + FOOTER
        num_rows = -(-len(after) // NUM_COLUMNS)
        parts = []
        for index, (panel, logits) in enumerate(after):
            row, column = divmod(index, NUM_COLUMNS)
            parts.append(f'<g transform="translate({column * WIDTH} {row * height})">')
            parts += self._panel(panel, logits, BAR / most)
            parts.append("</g>")
        size = f'width="{NUM_COLUMNS * WIDTH}" height="{num_rows * height}"'
        box = f'viewBox="0 0 {NUM_COLUMNS * WIDTH} {num_rows * height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {box} role="img">'
        return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>", ""])

    def _after(self, panel: Panel) -> Logits:
        record = sampling_record(SamplingParams(), seed=0, num_prompt_tokens=len(self._prompt))
        for name, value in panel.columns.items():
            record[name] = value
        mask = np.full(-(-self._logits.size // 32), 0xFFFFFFFF, np.uint32)
        for token in map(self._token, panel.banned):
            mask[token // 32] &= ~np.uint32(1 << token % 32)
        row = RowSampling(
            record[0],
            tokens=np.array(self._prompt + self._output, np.int32),
            bias=(np.array([*map(self._token, panel.bias)], np.int32), np.float32([*panel.bias.values()])),
            mask=mask,
            dry_breakers=np.array([self._token(".")], np.int32),
        )
        return warp(constrain(self._logits, row), row)

    def _token(self, text: str) -> int:
        (token,) = self._tokenizer.encode(text, add_special_tokens=False)
        return token

    def _rest(self, p: NDArray[np.float64]) -> float:
        """Probability of all tokens that are not shown."""
        return float(np.delete(p, self._top).sum())

    def _panel(self, panel: Panel, logits: Logits, scale: float) -> Iterable[str]:
        after, left = probabilities(logits), np.count_nonzero(logits > -np.inf)
        notes = [panel.note] if panel.note else []
        if left < after.size:
            notes.append(f"{left:,} of {after.size:,} left")
        title = f'{escape(panel.name)} <tspan class="value">{escape(panel.value)}</tspan>'
        yield f'<text class="name" x="{PADDING}" y="22">{title}</text>'
        yield f'<text class="note" x="{PADDING}" y="40">{escape(" · ".join(notes))}</text>'
        y = HEADER
        for token in self._top.tolist():
            text = self._tokenizer.decode([token]).strip()
            yield from self._row(y, text, float(self._before[token]), float(after[token]), scale)
            y += ROW
        rest = self._rest(after)
        kind = "rest" if rest > 0 else "gone"
        yield f'<text class="label {kind}" x="{PADDING + LABEL}" y="{y + 10}">all others</text>'
        yield f'<text class="number {kind}" x="{NUMBER_END}" y="{y + 10}">{self._number(rest)}</text>'

    def _row(self, y: int, text: str, before: float, after: float, scale: float) -> Iterable[str]:
        gone = "" if after > 0 else " gone"
        x = PADDING + LABEL + 8
        yield f'<text class="label{gone}" x="{PADDING + LABEL}" y="{y + 10}">{escape(text)}</text>'
        yield f'<rect class="before" x="{x}" y="{y - 1}" width="{max(before * scale, 1.0):.1f}" height="14" rx="2"/>'
        if after > 0:
            width = max(after * scale, 1.0)
            yield f'<rect class="after" x="{x}" y="{y + 3}" width="{width:.1f}" height="6" rx="1.5"/>'
        yield f'<text class="number{gone}" x="{NUMBER_END}" y="{y + 10}">{self._number(after)}</text>'

    @staticmethod
    def _number(probability: float) -> str:
        return f"{100 * probability:.1f}%" if probability > 0 else "\N{EN DASH}"


def main() -> None:
    with LLM(MODEL) as llm:
        prompt = llm.tokenizer.encode(PROMPT)
        output = llm.tokenizer.encode(OUTPUT, add_special_tokens=False)
        drawer = Drawer(llm.logits(prompt + output)[-1], prompt, output, llm.tokenizer)
        for name, panels in FIGURES.items():
            Path(__file__).with_name(f"{name}.svg").write_text(drawer.figure(panels), encoding="utf-8")


if __name__ == "__main__":
    main()

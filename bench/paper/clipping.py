"""How far does an update go? PPO's clip range against the KL from the policy that collected the data.

    python bench/paper/clipping.py [--only ENV ...] [--seeds 1-5] [--parallel 2]
    python bench/paper/clipping.py --report

The KL is the exact mean KL(old || new) over a rollout's observations after the update's last epoch. One call runs what
is missing and can be broken off at any time. Then, or with --report and nothing run, the table and picture of
docs/results.md are written from the results file, which is that of epochs.py too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _clips_and_epochs
import _pictures
from _clips_and_epochs import STANDARD_EPOCHS, Runs, clip_name, small
from _page import Page
from _report import provenance
from tables import table

CLIPS = (0.05, 0.1, 0.2, 0.3, 0.5, None)


def kl_table(runs: Runs) -> str:
    """A row a clip range in an environment."""
    lines = []
    for env_id in runs.environments:
        for clip in CLIPS:
            variant = (STANDARD_EPOCHS, clip)
            measured = [small(runs.get(variant, env_id, name)) for name in ("kl", "kl_high", "approx_kl")]
            clipped = "–" if clip is None else small(runs.get(variant, env_id, "clip_fraction"))
            lines.append([env_id, clip_name(clip), *measured, clipped, runs.scores_text(variant, env_id)])
    columns = ["environment", "clip", "KL after an update", "its 90 % quantile", "approximate KL in it",
               "clip fraction", "return (seeds)"]  # fmt: skip
    return table(columns, lines)


def draw(runs: Runs, path: Path) -> Path:
    """KL over training, its median by clip range, return by clip range."""
    figure, axes = _pictures.grid(3, len(runs.environments))
    for column, env_id in zip(axes.T, runs.environments, strict=True):
        for color, clip in enumerate(CLIPS):
            curves = runs.get((STANDARD_EPOCHS, clip), env_id, "kl_curve")
            _pictures.draw_curves(column[0], curves, f"C{color}", clip_name(clip))
        for axis, name in zip(column[1:], ("kl", "score"), strict=True):
            values = {clip_name(clip): runs.get((STANDARD_EPOCHS, clip), env_id, name) for clip in CLIPS}
            _pictures.draw_settings(axis, values, "C0", name)
            axis.set_xlabel("clip range")
        for axis in column[:2]:
            _pictures.log_scale(axis)
        column[0].set(title=env_id, xlabel="environment steps")
    for axis, label in zip(axes[:, 0], ("KL after an update", "KL, median of updates", "return"), strict=True):
        axis.set_ylabel(label)
    return _pictures.save(figure, axes, path)


def write_report(runs: Runs, page: Page) -> None:
    """The section of docs/results.md, and the picture."""
    text = f"{provenance(runs.records())}\n\n{kl_table(runs)}"
    if runs.records():
        text += page.picture("clipping.png", "KL and return by clip range", lambda path: draw(runs, path))
    page.section("clipping", text)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    return _clips_and_epochs.parse(__doc__, arguments)


def main(arguments: list[str] | None = None) -> None:
    _clips_and_epochs.run(parse(arguments), [(STANDARD_EPOCHS, clip) for clip in CLIPS], "clipping", write_report)


if __name__ == "__main__":
    main()

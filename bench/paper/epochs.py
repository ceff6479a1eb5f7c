"""How often may PPO use a rollout? Epochs a rollout against return at equal environment steps, clipped and not.

    python bench/paper/epochs.py [--only ENV ...] [--seeds 1-5] [--parallel 2]
    python bench/paper/epochs.py --report

One call runs what is missing and can be broken off at any time. Then, or with --report and nothing run, the table and
picture of docs/results.md are written from the results file, which is that of clipping.py too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _clips_and_epochs
import _pictures
from _clips_and_epochs import STANDARD_CLIP, Runs, small
from _page import Page
from _report import provenance
from tables import table

EPOCHS = (1, 3, 10, 20)
CLIPS = (STANDARD_CLIP, None)
COLORS = {STANDARD_CLIP: "C0", None: "C3"}


def title(clip: float | None) -> str:
    return "not clipped" if clip is None else f"clip {clip:g}"


def score_table(runs: Runs) -> str:
    """Return, and under it how far an update went."""
    lines = []
    for clip in CLIPS:
        for epochs in EPOCHS:
            line = [title(clip), str(epochs)]
            for env_id in runs.environments:
                line += [runs.scores_text((epochs, clip), env_id), small(runs.get((epochs, clip), env_id, "kl"))]
            lines.append(line)
    columns = [cell for env_id in runs.environments for cell in (f"{env_id} (seeds)", "KL of an update")]
    return table(["surrogate", "epochs", *columns], lines)


def draw(runs: Runs, path: Path) -> Path:
    """Returns above, KL of an update below."""
    figure, axes = _pictures.grid(2, len(runs.environments))
    for column, env_id in zip(axes.T, runs.environments, strict=True):
        for axis, name in zip(column, ("score", "kl"), strict=True):
            for clip in CLIPS:
                values = {str(epochs): runs.get((epochs, clip), env_id, name) for epochs in EPOCHS}
                _pictures.draw_settings(axis, values, COLORS[clip], title(clip))
            axis.set_xlabel("epochs a rollout")
        column[0].set_title(env_id)
        _pictures.log_scale(column[1])
    axes[0, 0].set_ylabel("return, mean of last 100 episodes")
    axes[1, 0].set_ylabel("KL(old || new) of an update, median")
    return _pictures.save(figure, axes, path)


def write_report(runs: Runs, page: Page) -> None:
    """The section of docs/results.md, and the picture."""
    text = f"{provenance(runs.records())}\n\n{score_table(runs)}"
    if runs.records():
        text += page.picture("epochs.png", "Return and KL against epochs a rollout", lambda path: draw(runs, path))
    page.section("epochs", text)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    return _clips_and_epochs.parse(__doc__, arguments)


def main(arguments: list[str] | None = None) -> None:
    _clips_and_epochs.run(
        parse(arguments), [(epochs, clip) for epochs in EPOCHS for clip in CLIPS], "epochs", write_report
    )


if __name__ == "__main__":
    main()

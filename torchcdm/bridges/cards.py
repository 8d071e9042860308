"""Model cards: what a trained model is, in the form of the Hugging Face Hub."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torchcdm.training.checkpoint import ModelInfo

ROWS = {
    "one-pass": "one pass, level 0",
    "one-pass-level": "one pass, through a little noise",
    "one-pass-normalized": "one pass, normalised",
    "elbo": "ELBO of the reverse chain",
    "flow": "probability flow",
}
"""Rows of a likelihood report as a card names them."""

LIMITS = ("Nothing makes exp(log p) integrate to one; `cdm nll MODEL --methods single,flow,logz` measures it.",)


def model_card(
    title: str,
    info: ModelInfo,
    parameters: int,
    description: str = "",
    data: str = "",
    report: Mapping[str, Any] | None = None,
    limits: Sequence[str] = (),
    command: str = "",
    use: str = "zoo:NAME",
) -> str:
    """The card of a model called ``title`` as Markdown with a head of fields.

    ``description`` is one line; ``data`` what it was trained on, with the licence; ``report`` the ``report.json`` of
    its run, whose numbers the card then has; ``limits`` what it is not for, one sentence each; ``command`` what makes
    it; ``use`` what ``torchcdm.load`` takes.
    """
    model, shape = info.model, "x".join(map(str, info.transform.shape))
    nll = (report or {}).get("nll")
    fields = (("description", description), ("reaches", _reaches(nll) if nll else ""))
    parts = ["---", "license: mit", "library_name: torchcdm",
             "tags: [density-estimation, diffusion, classification-diffusion]",
             *(f'{key}: "{value}"' for key, value in fields if value), "---", "", f"# {title}", ""]  # fmt: skip
    kind = "classification diffusion model" if model.kind == "cdm" else "plain denoising diffusion model"
    parts += [
        f"{description}. " * bool(description)
        + f"A {kind} of {shape} inputs: network `{model.backbone.name}` with {parameters:,} weights, schedule "
        f"`{model.schedule.name}` with {model.schedule.T} levels, labels `{model.labels}`.",
        f'\n```python\nimport torchcdm\n\nmodel = torchcdm.load("{use}")',
        "x = model.sample(16)                 # in the units of the data",
        *(["log_p = model.log_prob(x)            # nats, one forward pass"] if model.kind == "cdm" else []),
        "```\n\n## Data\n",
        data or f"{info.data.spec or 'not recorded'}. The licence of the data is not recorded.",
        "",
    ]
    if command:
        parts += ["## Made by", "", f"    {command}", ""]
    if nll:
        count, split = nll["data"]["count"], nll["data"]["split"]
        parts += ["## Numbers", "", f"{count} {split} samples, negative log-likelihood, lower is better.", ""]
        parts += [f"| likelihood | {nll['unit']} | s.e. |", "|---|---|---|"]
        parts += [
            f"| {ROWS[row['name']]} | {row['value']:.3f} | {row['se']:.3f} |"
            for row in nll["rows"] if row["name"] in ROWS and row["value"] is not None
        ]  # fmt: skip
        parts += [f"| {other['name']} (not this model) | {other['value']:.3f} | {other['se']:.3f} |"
                  for other in sorted(report["baselines"], key=lambda other: other["value"])]  # fmt: skip
        # Without log Z there is nothing to believe or not.
        believed = f"Is one pass to be believed: {'yes' if nll['believe'] else 'no'}. {nll['why']}"
        unknown = "Log Z was not estimated: one pass has no verdict."
        parts += ["", believed if nll.get("log2_z_per_dim") else unknown, ""]
    parts += ["## Limits", "", *(f"- {limit}" for limit in (*limits, *LIMITS)), ""]
    return "\n".join(parts)


def _reaches(nll: Mapping[str, Any]) -> str:
    """The headline of a likelihood report: normalised pass and flow; without log Z the ELBO, or what there is."""
    rows = {row["name"]: row["value"] for row in nll["rows"] if row["value"] is not None}
    pairs = (("one-pass-normalized", "flow"), ("elbo",), ("one-pass", "flow"))
    chosen = next((names for names in pairs if names[0] in rows), ())
    found = [f"{ROWS[name]} {rows[name]:.2f}" for name in chosen if math.isfinite(rows.get(name, math.nan))]
    return f"{', '.join(found)} {nll['unit']} ({nll['data']['count']} {nll['data']['split']} samples)"

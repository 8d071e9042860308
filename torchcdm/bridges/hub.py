"""Models on the Hugging Face Hub: safetensors, JSON and a model card in its form, and never code."""

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PureWindowsPath  # the latter knows the separators of both
from typing import Any

from torchcdm.errors import UserError, needed, reason
from torchcdm.likelihood.log_z import read_log_z, weights_of, write_log_z
from torchcdm.models.denoiser import Denoiser
from torchcdm.runtime.artefact import read_json
from torchcdm.runtime.files import write_file
from torchcdm.training.checkpoint import ModelInfo, info_of, load, save
from torchcdm.training.run_folder import RunFolder
from torchcdm.zoo import CARD, HUB_FILES, located

ROWS = {
    "one-pass": "one pass, level 0", "one-pass-level": "one pass, through a little noise",
    "one-pass-normalized": "one pass, normalised", "one-pass-restricted": "one pass, bound for any input",
    "few-pass-restricted": "few passes, bound for any input", "elbo": "ELBO of the reverse chain",
    "flow": "probability flow",
}  # fmt: skip
"""Rows of a likelihood report as a card names them."""


def push(model: str | Path | Denoiser, repository: str, private: bool = False) -> str:
    """Uploads weights, settings, a card, and log Z and placed steps where they are kept; see ``hf auth login``.

    Paths of the data that the model was trained on, and of the code of a network, are cut to their last part. Gives
    the address. UserError for a wrong name, a model that cannot be saved, or a Hub that refuses it.

    Args:
        model: A model, or what :func:`torchcdm.load` takes.
        repository: ``owner/name`` on the Hub; it is made where it does not exist.
        private: Whether a new repository is private.
    """
    hub = needed("huggingface_hub", "hub", "the Hub")
    if not isinstance(repository, str) or repository.count("/") != 1 or not all(repository.split("/")):
        raise UserError(f"'{repository}' is no repository; write OWNER/NAME")
    report = log_z = card = None
    if not isinstance(model, Denoiser):
        folder = RunFolder(located(model))
        kept = folder.root / CARD
        card = kept.read_text(encoding="utf-8") if kept.exists() else None
        report = read_json(folder.report) if folder.report.exists() else None
        log_z = read_log_z(folder.root)
        model = load(model)
    info = model.info or info_of(model)
    kind, colon, place = (info.data.spec or "").partition(":")
    local = place.startswith((".", "~")) or PureWindowsPath(place).anchor or os.path.exists(place)
    if kind and (kind != "hf" or local):  # others of hf are names on the Hub
        info = replace(info, data=replace(info.data, spec=f"{kind}{colon}{PureWindowsPath(place).name}"))
    if code := getattr(info.model.backbone, "code", None):
        network = replace(info.model.backbone, code=PureWindowsPath(code).name)
        info = replace(info, model=replace(info.model, backbone=network))
    weights = sum(part.numel() for part in model.parameters())
    text = card or model_card(repository, info, weights, report=report, use=f"hub:{repository}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save(model, folder, info)
        write_file(folder / "README.md", text)
        if log_z is not None:
            write_log_z(folder, log_z, weights_of(folder))
        try:
            api = hub.HfApi()
            address = str(api.create_repo(repository, private=private, exist_ok=True))
            said = "A model of torchcdm"
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message=said, allow_patterns=HUB_FILES)
        except Exception as error:  # its failures have no common type
            raise UserError(f"hub:{repository}: cannot be written ({reason(error)})") from None
    return address


def model_card(
    title: str, info: ModelInfo, parameters: int, description: str = "", data: str = "",
    report: Mapping[str, Any] | None = None, limits: Sequence[str] = (), use: str = "hub:OWNER/NAME",
) -> str:  # fmt: skip
    """The card of a model called ``title`` as Markdown with a head of fields.

    ``description`` is one line; ``data`` what it was trained on, with the licence; ``report`` the ``report.json`` of
    its run, with numbers; ``limits`` what it is not for, a sentence each; ``use`` what ``torchcdm.load`` takes.
    """
    jinja2, nll, rows = needed("jinja2", "hub", "the card of a model"), (report or {}).get("nll"), []
    if nll:
        rows = [row | {"name": ROWS[row["name"]]} for row in nll["rows"] if row["name"] in ROWS]
        others = sorted(report["baselines"], key=lambda other: other["value"])
        rows += [other | {"name": f"{other['name']} (not this model)"} for other in others]
    texts = {"title": title, "use": use, "description": description, "reaches": _reaches(nll) if nll else ""}
    texts["data"] = data or f"{info.data.spec or 'not recorded'}. The licence of the data is not recorded."
    about = {"model": info.model, "cdm": info.model.kind == "cdm", "weights": f"{parameters:,}", "limits": limits}
    about |= {"shape": "x".join(map(str, info.transform.shape)), "nll": nll}
    about["rows"] = [row for row in rows if row["value"] is not None]
    text = Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8")
    layout = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return layout.from_string(text).render(texts | about)


def _reaches(nll: Mapping[str, Any]) -> str:
    """The headline of a likelihood report: normalised pass and flow; without log Z the ELBO, or what there is."""
    rows = {row["name"]: row["value"] for row in nll["rows"] if row["value"] is not None}
    pairs = (("one-pass-normalized", "flow"), ("one-pass-restricted", "flow"), ("elbo",), ("one-pass", "flow"))
    chosen = next((names for names in pairs if names[0] in rows), ())
    found = [f"{ROWS[name]} {rows[name]:.2f}" for name in chosen if math.isfinite(rows.get(name, math.nan))]
    return f"{', '.join(found)} {nll['unit']} ({nll['data']['count']} {nll['data']['split']} samples)"

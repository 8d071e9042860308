"""Models on the Hugging Face Hub: safetensors, JSON and a card, and never code."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from torchcdm.bridges.cards import model_card
from torchcdm.errors import UserError, needed, reason
from torchcdm.models.denoiser import Denoiser
from torchcdm.runtime.artefact import read_json
from torchcdm.runtime.files import write_file
from torchcdm.training.checkpoint import described, load, save
from torchcdm.training.run_folder import RunFolder
from torchcdm.zoo import CARD, located


def push(model: str | Path | Denoiser, repository: str, private: bool = False, card: str = "") -> str:
    """Uploads a model: ``config.json``, ``model.safetensors`` and ``README.md``, the card; see ``hf auth login``.

    Paths of the data that the model was trained on are cut to their last part.

    Args:
        model: A model, or what :func:`torchcdm.load` takes.
        repository: ``owner/name`` on the Hub; it is made where it does not exist.
        private: Whether a new repository is private.
        card: Text of the card; that of a model of the zoo, or one made of what is known of the model, when empty.

    Returns:
        The address.

    Raises:
        UserError: A wrong name, a model that cannot be saved, or a Hub that refuses it.
    """
    hub = needed("huggingface_hub", "hub", "the Hub")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise UserError(f"'{repository}' is no repository; write OWNER/NAME")
    report = None
    if not isinstance(model, Denoiser):
        folder = RunFolder(located(model))
        kept = folder.root / CARD
        card = card or (kept.read_text(encoding="utf-8") if kept.exists() else "")
        report = read_json(folder.report) if folder.report.exists() else None
        model = load(model)
    info = model.info or described(model)
    kind, colon, place = (info.data.spec or "").partition(":")
    if kind in ("folder", "array", "table", "celeba"):
        info = replace(info, data=replace(info.data, spec=f"{kind}{colon}{Path(place).name}"))
    weights = sum(part.numel() for part in model.parameters())
    text = card or model_card(repository, info, weights, report=report, use=f"hub:{repository}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save(model, folder, info)
        write_file(folder / "README.md", text)
        try:
            api = hub.HfApi()
            address = str(api.create_repo(repository, private=private, exist_ok=True))
            api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message="A model of torchcdm",
                allow_patterns=["config.json", "model.safetensors", "README.md"],
            )  # fmt: skip
        except Exception as error:  # its failures have no common type
            raise UserError(f"hub:{repository}: cannot be written ({reason(error)})") from None
    return address

"""Small trained models that ship with the package, and where a model is that a name stands for."""

import os
from pathlib import Path

from torchcdm.errors import UserError, nearest, needed, reason

HOME = Path(__file__).parent
CARD = "card.md"  # what a model of the zoo is, what it was trained on, and what it reaches

# All that is read of a repository on the Hugging Face Hub: numbers and text, never code.
HUB_FILES = ["config.json", "model.safetensors", "README.md"]
HUB_FILES += [f"{part}.{kind}" for part in ("log_z", "curvatures") for kind in ("json", "safetensors")]


def names() -> list[str]:
    """Names of the models of the zoo, without ``zoo:``, sorted."""
    return sorted(path.parent.name for path in HOME.glob(f"*/{CARD}"))


def about(name: str) -> dict[str, str]:
    """The head of the card of a model of the zoo: ``license``, ``description``, ``reaches`` and others."""
    lines = (HOME / name / CARD).read_text(encoding="utf-8").split("---\n")[1].splitlines()
    return {key: value.strip('"') for key, _, value in (line.partition(": ") for line in lines)}


def located(model: str | Path) -> Path:
    """The folder that is given; that of ``zoo:NAME`` in this package; of ``hub:OWNER/NAME[@REVISION]`` on the Hugging
    Face Hub, whose files are downloaded unless they are at hand. UserError for what is neither text nor path, a name
    that the zoo does not have, or what cannot be downloaded."""
    if not isinstance(model, str | os.PathLike):
        raise UserError(f"{type(model).__name__} names no model; give the folder of a run, zoo:NAME or hub:OWNER/NAME")
    kind, colon, name = str(model).partition(":")
    if colon and kind == "zoo":
        if name not in names():
            raise UserError(f"{model}: not in the zoo; {nearest(name, names())}")
        return HOME / name
    if not colon or kind != "hub":
        return Path(model)
    hub = needed("huggingface_hub", "hub", f"{model}:")
    repository, _, revision = name.partition("@")
    if repository.count("/") != 1:
        raise UserError(f"{model}: write hub:OWNER/NAME")
    try:
        return Path(hub.snapshot_download(repository, revision=revision or None, allow_patterns=HUB_FILES))
    except Exception as error:  # a wrong name, no such repository, no network: they have no common type
        raise UserError(f"{model}: cannot be downloaded ({reason(error)})") from None

"""A hub folder: the layout of timm's `save_for_hf_hub` and `push_to_hf_hub`, with a model card written from the run.

Plain timm loads it: `import spikingformer; timm.create_model("local-dir:FOLDER", pretrained=True)`, and once it is on a
hub `timm.create_model("hf-hub:USER/NAME", pretrained=True)`.
"""

import json
import re
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from timm.models import save_for_hf

from spikingformer.files import PARTIAL, move_into_place
from spikingformer.models import VARIANTS, SpikingTransformer
from spikingformer.training.checkpoint import check_head
from spikingformer.training.hub_folder import CONFIG_FILE, WEIGHTS_FILE

from .fold import is_folded
from .metadata import ExportMetadata
from .model_card import CardFacts, model_card
from .prepare import check_weights

CARD_FILE = "README.md"


def save_hub_folder(model: SpikingTransformer, folder: str | Path, metadata: ExportMetadata, card: CardFacts) -> Path:
    """Writes config.json, model.safetensors (not folded: it can be fine-tuned) and README.md; returns the folder.

    Raises ValueError for a folded model, for a head that is not one linear layer of num_classes outputs, and for a
    folder that already holds other files; OSError if it cannot be written.
    """
    if is_folded(model):
        raise ValueError("a hub folder holds a model that can be trained further: give it before BatchNorm is folded")
    target = Path(folder)
    _check_target(target)
    check_weights(model)
    check_head(model)
    pre = metadata.preprocessing
    config: dict[str, Any] = {
        "label_names": list(metadata.class_names),
        "time_steps": metadata.time_steps,
        "checkpoint_sha256": metadata.checkpoint_sha256,
        **({"event_framing": asdict(pre.framing)} if metadata.input == "events" else {}),
        "pretrained_cfg": {
            "input_size": (model.config.in_chans, *pre.size),
            "mean": pre.mean,
            "std": pre.std,
            "interpolation": pre.interpolation,
            "crop_pct": pre.crop_fraction,
            "license": card.licence,
        },
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    same_disk = target if target.is_dir() else target.parent  # an existing target may lie on another one
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=same_disk) as beside:
        made = Path(beside)
        arguments = arguments_beyond_variant(metadata)
        try:
            save_for_hf(model, beside, model_config=config, model_args=arguments, safe_serialization=True)
        except SafetensorError as error:  # a full disk, for one
            raise OSError(f"{target}: {error}") from None
        _keep_channels(made / CONFIG_FILE, config["pretrained_cfg"])
        (made / CARD_FILE).write_text(model_card(metadata, card), encoding="utf-8")
        target.mkdir(exist_ok=True)
        (target / CONFIG_FILE).unlink(missing_ok=True)  # without it the folder is no model: never half of each
        for name in (WEIGHTS_FILE, CARD_FILE, CONFIG_FILE):
            move_into_place(made / name, target / name)
    return target


def push_hub_folder(folder: str | Path, repository: str, token: str | None = None, private: bool = True) -> str:
    """Uploads a folder of `save_hub_folder` to `repository` ("user/name"); returns its address.

    Raises ValueError for a folder without a model and for a name that is not "user/name".
    """
    from huggingface_hub import HfApi

    source = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE):
        if not (source / name).is_file():
            raise ValueError(f"{source} has no {name}: write it with save_hub_folder first")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f'a repository is named "user/name", got {repository!r}')
    api = HfApi(token=token)
    address = api.create_repo(repository, private=private, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=str(source))
    return str(address)


def arguments_beyond_variant(metadata: ExportMetadata) -> dict[str, Any]:
    """The arguments of timm.create_model that make this model from its variant: those that differ."""
    variant = VARIANTS[metadata.model]
    names = [f.name for f in fields(variant) if f.name != "drop_path_rate"]
    return {n: metadata.config[n] for n in names if metadata.config[n] != getattr(variant, n)}


def _keep_channels(config_file: Path, preprocessing: dict[str, Any]) -> None:
    """timm takes every model for one of three channels and averages mean and std over them: ours stand as they are."""
    written = json.loads(config_file.read_text(encoding="utf-8"))
    written["pretrained_cfg"] |= preprocessing
    config_file.write_text(json.dumps(written, indent=2), encoding="utf-8")


def _check_target(target: Path) -> None:
    if target.is_file():
        raise ValueError(f"{target} is a file: name a folder to write the model to")
    ours = {CARD_FILE, CONFIG_FILE, WEIGHTS_FILE}
    if target.is_dir() and (others := sorted(p.name for p in target.iterdir() if p.name not in ours)):
        raise ValueError(
            f"{target} holds other files ({others[0]}): name a new folder, as all of it would be published"
        )

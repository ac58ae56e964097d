"""Write a model as one file for everybody else: in our names, the published ones, or MONAI's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file

from meduet_fast.errors import UserError
from meduet_fast.files import atomic_path
from meduet_fast.weight_files import MODEL_FILE

from .meduet import MeDUET
from .monai_names import to_monai_unetr, to_monai_vit
from .published import CONFIG_FILE

ExportFormat = Literal["meduet", "reference", "monai-vit", "unetr"]


def export_model(
    model: MeDUET, output: Path, form: ExportFormat = "meduet", source: Mapping[str, Any] | None = None
) -> list[Path]:
    """Write a model's weights, and what a reader has to know to load them.

    Args:
        model: on any device.
        output: a name that ends in ``.safetensors`` is the one file to write; anything else is a folder that
            gets ``model.safetensors`` and ``config.json``, which says the class and its arguments.
        form: "meduet" is loaded by :meth:`MeDUET.from_pretrained`; "reference" has the published names and is
            loaded by :meth:`MeDUET.from_reference`; "monai-vit" is loaded by MONAI's ``ViT``, and "unetr" by
            the ``vit`` of its ``UNETR``, see ``monai_names.py``.
        source: where the weights come from: JSON values for ``config.json``.

    Returns:
        The files written.

    Raises:
        UserError: if the model does not fit the form, or the files can't be written.
    """
    single = output.suffix == ".safetensors"
    file = output if single else output / MODEL_FILE
    about: dict[str, Any] = {"class": "meduet_fast.models.MeDUET", "arguments": asdict(model.config)}
    tensors = model.to_reference()
    if form in ("monai-vit", "unetr"):
        name, convert = ("ViT", to_monai_vit) if form == "monai-vit" else ("UNETR", to_monai_unetr)
        tensors, arguments = convert(tensors, model.config)
        about = {"class": f"monai.networks.nets.{name}", "arguments": arguments}
        about["layer_norm_eps"] = model.config.layer_norm_eps  # their LayerNorms take it as no argument
        if form == "unetr":
            about["latents_repeated"] = arguments["img_size"][0] // model.config.latent_size
    try:
        if form == "meduet":
            model.save_pretrained(file)
        else:
            metadata = {"format": "pt", "config": json.dumps(about)}
            tensors = {key: value.cpu().contiguous() for key, value in tensors.items()}
            with atomic_path(file) as temporary:
                save_file(tensors, temporary, metadata)
        if single:
            return [file]
        config = output / CONFIG_FILE
        with atomic_path(config) as temporary:
            text = json.dumps({"format": form, **about, **(source or {})}, indent=1)
            temporary.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{output}: can't be written: {error.strerror or error}") from error
    return [file, config]

"""model_index.json: of which parts a folder of diffusers consists, and which of its classes opens it.

A model of latents is an LDMPipeline: the one pipeline of diffusers' that draws latents without a condition. It calls
the autoencoder `vqvae`, and takes an AutoencoderKL as well as a VQModel.
"""

from collections.abc import Mapping
from typing import Any

from workers.kinds import AUTOENCODER
from workers.network.autoencoder_config import find_latent_size
from workers.network.build import CLASS, find_entry, find_family, is_foreign
from workers.network.diffusers_config import VERSION, is_continuous
from workers.network.manifest import STAGE

STAGE_CLASS = ["diffusers", "AutoencoderKL"]


def make_index(config: Mapping[str, Any], scheduler: Mapping[str, Any], *, latent: bool = False) -> dict[str, Any]:
    """What diffusers opens, of the config.json of a network and of its scheduler; of a network or a formulation that is
    not ours it has no class."""
    if find_entry(config):
        part, library = ("vae", "diffusers") if find_family(config) == AUTOENCODER else ("generator", "workers")
        return {"_diffusers_version": VERSION, part: [library, config[CLASS]]}
    name = scheduler[CLASS] if is_continuous(scheduler.get(CLASS)) or "student" in scheduler else "DDPMScheduler"
    kind = config.get(CLASS, "UNet2DModel")
    unet = [kind.partition(":")[0] if is_foreign(config) else "diffusers", kind]
    return {
        "_class_name": "LDMPipeline" if latent else "DDIMPipeline" if name == "DDIMScheduler" else "DDPMPipeline",
        "_diffusers_version": VERSION,
        "scheduler": [name.partition(":")[0] if ":" in name else "diffusers", name],
        "unet": unet,
        **({STAGE: STAGE_CLASS} if latent else {}),
    }


def read_index(index: dict[str, Any]) -> None:
    """Refuses a pipeline that is more than a network, a scheduler and an autoencoder. Raises ValueError."""
    name = index.get("_class_name", "pipeline")
    present = {k: v for k, v in index.items() if not k.startswith("_") and isinstance(v, list) and v[:1] != [None]}
    if more := sorted(present.keys() - {"unet", "scheduler", STAGE}):
        raise ValueError(
            f"a {name} with {', '.join(more)}: it works in a latent space or under a condition, and its unet alone "
            "does not define images; give an unconditional pipeline on pixels, such as a DDPMPipeline, or on latents, "
            "such as an LDMPipeline"
        )
    if missing := sorted({"unet", "scheduler"} - present.keys()):
        raise ValueError(f"a {name} without {' and '.join(missing)}; give a pipeline such as a DDPMPipeline")
    if present.get(STAGE, STAGE_CLASS) != STAGE_CLASS:
        raise ValueError(
            f"a {name} with {STAGE}: {present[STAGE][-1]}, whose latents have no density; give an AutoencoderKL's"
        )


def check_latents(shape: tuple[int, int, int], config: dict[str, Any]) -> None:
    """Raises ValueError where a network of that shape (height, width, channels) does not take the latents that an
    autoencoder of this config.json makes."""
    channels, height, width = find_latent_size(config)
    if shape != (height, width, channels):
        raise ValueError(
            f"its network takes {shape[1]}x{shape[0]} in {shape[2]} channels, and its autoencoder makes latents of "
            f"{width}x{height} in {channels}; they are not of one model"
        )

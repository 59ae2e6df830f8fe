"""A variational autoencoder: q(z | x) = N(mean, diag(e^log_variance)), p(z) = N(0, I), and p(x | z) around x_hat(z).

-log p(x) <= E_q[-log p(x | z)] + KL(q(z | x) || p(z)) (Kingma & Welling 2014, eq. 3): distortion and rate. The modules
of `Autoencoder` are named and shaped as in diffusers' AutoencoderKL (Rombach et al. 2022), so that one set of weights
opens in both; beside these it has the scale of p(x | z), which diffusers has not.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from workers.diffusion.bound import decoder_term
from workers.network.attention import Attention, GroupNorm
from workers.network.autoencoder_config import AUTOENCODER_DEFAULTS, DECODER
from workers.network.unet import Downsample, Upsample
from workers.shapes import NCHW, PerImage64

Latents = Float[Tensor, "n z height width"]
Image = Float[Tensor, "n channels h_image w_image"]
LOG_SCALE = "log_scale"  # the one weight that diffusers does not know
FIRST_LOG_SCALE = -1.0  # the scale of p(x | z) that training begins with is a fifth of the range [-1, 1]
LEAST_LOG_VARIANCE, MOST_LOG_VARIANCE = -30.0, 20.0  # to which diffusers clips it

# Fields of the config that are built here in more than one way. Every other field must have diffusers' default.
BUILT = {
    "sample_size", "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels",
    "layers_per_block", "latent_channels", "norm_num_groups", "mid_block_add_attention", "scaling_factor",
    "force_upcast", "use_quant_conv", "use_post_quant_conv",
}  # fmt: skip


@dataclass(frozen=True)
class Posterior:
    """q(z | x), a Gaussian of independent coordinates."""

    mean: Latents
    log_variance: Latents

    def sample(self, eps: Latents) -> Latents:
        """z = mean + sigma eps: the reparametrisation, for eps of N(0, I)."""
        return self.mean + torch.exp(self.log_variance / 2) * eps

    def compute_rate(self) -> PerImage64:
        """KL(q(z | x) || N(0, I)) in nats: sum of (mean^2 + sigma^2 - 1 - log sigma^2) / 2."""
        mean, log_variance = self.mean.double(), self.log_variance.double()
        terms = mean.square() + torch.expm1(log_variance) - log_variance
        rate: PerImage64 = terms.flatten(1).sum(1) / 2
        return rate


class Pass(NamedTuple):
    """What a training step asks of an autoencoder: tensors alone, as data-parallel and compiled modules want it."""

    mean: Latents
    log_variance: Latents
    x_hat: Image

    @property
    def posterior(self) -> Posterior:
        return Posterior(self.mean, self.log_variance)


class FromLatents(nn.Module, ABC):
    """A network that makes images of z, by one pass: an autoencoder, or the generator of a GAN."""

    config: dict[str, Any]

    @abstractmethod
    def decode(self, z: Latents) -> Image:
        """x_hat, an image on [-1, 1] or near."""


class FirstStage(FromLatents):
    """What training, evaluation and latent diffusion ask of an autoencoder. Images are on [-1, 1].

    `law` names that of p(x | z) around x_hat (`workers.diffusion.bound.LAWS`), whose scale is learned, one for all
    pixels: e^log_scale.
    """

    law: str
    log_scale: nn.Parameter  # `decode` gives the centre of p(x | z)

    @abstractmethod
    def encode(self, x: Image) -> Posterior:
        """q(z | x)."""

    def forward(self, x: Image, eps: Latents) -> Pass:
        """Encodes images, and decodes one z of each, drawn by `eps`."""
        posterior = self.encode(x)
        return Pass(posterior.mean, posterior.log_variance, self.decode(posterior.sample(eps)))

    def compute_distortion(self, x: Image, x_hat: Image, levels: int | None) -> PerImage64:
        """-log p(x | z) in nats of images in `levels` values through the discrete decoder (Ho et al. 2020, eq. 13), or
        of a density where they are None."""
        scale = self.log_scale.double().exp().expand(len(x))[:, None, None, None]
        nats: PerImage64 = decoder_term(x, x_hat, scale, levels, law=self.law)
        return nats


def check_autoencoder_config(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with diffusers' default for each field left out; ValueError naming every field not supported here."""
    full = {**AUTOENCODER_DEFAULTS, **{name: value for name, value in config.items() if not name.startswith("_")}}
    mistakes = [
        f"{name}: {value!r} is not supported"
        + (f"; only {AUTOENCODER_DEFAULTS[name]!r} is" if name in AUTOENCODER_DEFAULTS else "")
        for name, value in full.items()
        if name not in BUILT and (name not in AUTOENCODER_DEFAULTS or value != AUTOENCODER_DEFAULTS[name])
    ]
    for field, known in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if full[field] != [known] * len(full["block_out_channels"]):
            mistakes.append(f"{field}: {full[field]!r} must be {known} for each of block_out_channels")
    mistakes += [
        f"norm_num_groups: {full['norm_num_groups']} must divide the block_out_channels {width}"
        for width in full["block_out_channels"]
        if width % full["norm_num_groups"]
    ]
    if full["in_channels"] != full["out_channels"]:
        mistakes.append(f"out_channels: {full['out_channels']} must be the in_channels {full['in_channels']}")
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return {**full, "norm_eps": 1e-6, "attention_head_dim": None}


class Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution of x where widths differ."""

    def __init__(self, in_channels: int, out_channels: int, config: dict[str, Any]) -> None:
        super().__init__()
        groups, eps = config["norm_num_groups"], config["norm_eps"]
        self.norm1 = GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: NCHW) -> Float[Tensor, "n out h w"]:
        h = self.conv1(F.silu(self.norm1(x)))
        y: Tensor = self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))
        return y


class Scale(nn.Module):
    """The blocks of one resolution, and what leads to the next."""

    def __init__(self, widths: list[tuple[int, int]], config: dict[str, Any], down: bool, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Residual(i, o, config) for i, o in widths)
        width = widths[-1][1]
        if down:
            self.downsamplers = nn.ModuleList([] if last else [Downsample(width, 0)])
        else:
            self.upsamplers = nn.ModuleList([] if last else [Upsample(width)])

    def forward(self, h: NCHW) -> Float[Tensor, "n out height width"]:
        for child in self.children():
            for module in child:  # type: ignore[attr-defined]
                h = module(h)
        return h


class Centre(nn.Module):
    """Block, attention where there is any, block at the lowest resolution."""

    def __init__(self, width: int, config: dict[str, Any]) -> None:
        super().__init__()
        attends = config["mid_block_add_attention"]
        self.attentions = nn.ModuleList([Attention(width, config)] if attends else [])
        self.resnets = nn.ModuleList(Residual(width, width, config) for _ in range(2))

    def forward(self, h: NCHW) -> NCHW:
        h = self.resnets[0](h)
        for attention in self.attentions:
            h = attention(h)
        y: Tensor = self.resnets[1](h)
        return y


class Encoder(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        widths, blocks = config["block_out_channels"], config["layers_per_block"]
        self.conv_in = nn.Conv2d(config["in_channels"], widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for before, width in zip([widths[0], *widths], widths, strict=False):
            shapes = [(before if j == 0 else width, width) for j in range(blocks)]
            self.down_blocks.append(Scale(shapes, config, True, len(self.down_blocks) == len(widths) - 1))
        self.mid_block = Centre(widths[-1], config)
        self.conv_norm_out = GroupNorm(config["norm_num_groups"], widths[-1], eps=config["norm_eps"])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config["latent_channels"], 3, padding=1)

    def forward(self, x: Image) -> Latents:
        h = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        for level in self.down_blocks:
            h = level(h)
        y: Tensor = self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h))))
        return y


class ImageDecoder(nn.Module):
    """From latents to images; a GAN's generator is one as well."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        widths, blocks = config["block_out_channels"][::-1], config["layers_per_block"] + 1
        self.conv_in = nn.Conv2d(config["latent_channels"], widths[0], 3, padding=1)
        self.mid_block = Centre(widths[0], config)
        self.up_blocks = nn.ModuleList()
        for before, width in zip([widths[0], *widths], widths, strict=False):
            shapes = [(before if j == 0 else width, width) for j in range(blocks)]
            self.up_blocks.append(Scale(shapes, config, False, len(self.up_blocks) == len(widths) - 1))
        self.conv_norm_out = GroupNorm(config["norm_num_groups"], widths[-1], eps=config["norm_eps"])
        self.conv_out = nn.Conv2d(widths[-1], config["out_channels"], 3, padding=1)

    def forward(self, z: Latents) -> Image:
        h = self.mid_block(self.conv_in(z.contiguous(memory_format=torch.channels_last)))
        for level in self.up_blocks:
            h = level(h)
        y: Tensor = self.conv_out(F.silu(self.conv_norm_out(h)))
        return y.contiguous()


@torch.no_grad()
def initialise(network: nn.Module, generator: torch.Generator | None, zero: tuple[str, ...]) -> None:
    """The U-Net's first weights: uniform with variance 1 / mean(fan in, fan out), biases 0; and those whose names end
    with one of `zero` are 0, so that residual blocks begin as the identity."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if name.endswith(zero):
                nn.init.zeros_(module.weight)
            else:
                nn.init.xavier_uniform_(module.weight, generator=generator)


class Autoencoder(FirstStage):
    """The convolutional autoencoder that the config.json of a diffusers AutoencoderKL describes.

    The state dict has diffusers' names and shapes, and `log_scale`. Initial weights come from `generator` (None:
    torch's global one). Raises ValueError for a config that asks for what is not built here.
    """

    def __init__(self, config: dict[str, Any], generator: torch.Generator | None = None) -> None:
        super().__init__()
        c = check_autoencoder_config(config)
        z = c["latent_channels"]
        self.config, self.law = dict(config), config.get(DECODER, "gaussian")
        self.encoder, self.decoder = Encoder(c), ImageDecoder(c)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1) if c["use_quant_conv"] else nn.Identity()
        self.post_quant_conv = nn.Conv2d(z, z, 1) if c["use_post_quant_conv"] else nn.Identity()
        self.log_scale = nn.Parameter(torch.tensor(FIRST_LOG_SCALE))
        initialise(self, generator, zero=("conv2", "to_out.0", "decoder.conv_out"))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """diffusers has no scale of p(x | z); the loss of LDM begins with e^0."""
        state_dict.setdefault(f"{prefix}log_scale", torch.zeros_like(self.log_scale))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weights that the adversarial term is weighed at."""
        weights = self.decoder.conv_out.weight
        assert isinstance(weights, nn.Parameter)
        return weights

    def encode(self, x: Image) -> Posterior:
        mean, log_variance = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return Posterior(mean, log_variance.clamp(LEAST_LOG_VARIANCE, MOST_LOG_VARIANCE))

    def decode(self, z: Latents) -> Image:
        x_hat: Tensor = self.decoder(self.post_quant_conv(z))
        return x_hat

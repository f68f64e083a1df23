"""The sizes of a FLUX.2 VAE, as its `vae/config.json` states them."""

from __future__ import annotations

from attrs import field, frozen

from lens_core.types import ConfigError
from lens_core.validators import CHANNELS, LAYERS, each, listed, optional, real


@frozen
class Flux2VAEConfig:
    """The fields of the published `vae/config.json`; the defaults are the published model."""

    # Channels; every level but the last halves H, W.
    block_out_channels: tuple[int, ...] = field(
        default=(128, 256, 512, 512), converter=listed, validator=each(CHANNELS, at_least=1)
    )
    # None: as the encoder.
    decoder_block_out_channels: tuple[int, ...] | None = field(
        default=None, converter=listed, validator=optional(each(CHANNELS, at_least=1))
    )
    layers_per_block: int = field(default=2, validator=LAYERS)
    latent_channels: int = field(default=32, validator=CHANNELS)  # c
    # On a CPU, training is twice as fast with 16 channels a group or more.
    norm_num_groups: int = field(default=32, validator=CHANNELS)
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    batch_norm_eps: float = field(default=1e-4, validator=real(above=0))

    def __attrs_post_init__(self) -> None:
        for name in ("block_out_channels", "decoder_block_out_channels"):
            widths = getattr(self, name)
            if widths is not None and any(n % self.norm_num_groups for n in widths):
                raise ConfigError(
                    f"vae: {name} is {list(widths)}; give multiples of norm_num_groups ({self.norm_num_groups})"
                )
        if self.decoder_block_out_channels and len(self.decoder_block_out_channels) != len(self.block_out_channels):
            raise ConfigError(
                f"vae: decoder_block_out_channels has {len(self.decoder_block_out_channels)} levels; "
                f"block_out_channels has {len(self.block_out_channels)}, and both must match"
            )

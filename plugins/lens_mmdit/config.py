"""The sizes of a Lens transformer, as its `transformer/config.json` states them."""

from __future__ import annotations

from attrs import field, frozen

from lens_core.types import ConfigError
from lens_core.validators import CHANNELS, LAYERS, each, integer, listed, optional


@frozen
class MMDiTConfig:
    """The fields of the published `transformer/config.json`; the defaults are the published model."""

    # Latent pixels a token is wide, folded into channels by the VAE component.
    patch_size: int = field(default=2, validator=integer(at_least=1, at_most=256))
    in_channels: int = field(default=128, validator=CHANNELS)  # latent channels C, = patch_size^2 * out_channels
    out_channels: int = field(default=32, validator=CHANNELS)  # channels of an unfolded latent pixel
    num_layers: int = field(default=48, validator=LAYERS)  # blocks
    attention_head_dim: int = field(default=64, validator=CHANNELS)  # channels a head
    num_attention_heads: int = field(default=24, validator=CHANNELS)
    # Width of both streams; always heads * head width.
    inner_dim: int | None = field(default=None, validator=optional(CHANNELS))
    enc_hidden_dim: int = field(default=2880, validator=CHANNELS)  # width of a text feature
    # Channels of a head that turn with frame, height, width.
    axes_dims_rope: tuple[int, ...] = field(
        default=(8, 28, 28), converter=listed, validator=each(integer(at_least=0, at_most=2**16))
    )
    gate_mlp: bool = True  # SwiGLU
    rms_norm: bool = True
    multi_layer_encoder_feature: bool = True
    # Encoder layers that feed the text stream; only how many.
    selected_layer_index: tuple[int, ...] = field(
        default=(5, 11, 17, 23), converter=listed, validator=each(integer(at_least=0), at_least=1)
    )

    def __attrs_post_init__(self) -> None:
        problems = [
            f"backbone: {name} is False; only True, as published, is implemented"
            for name in ("gate_mlp", "rms_norm", "multi_layer_encoder_feature")
            if not getattr(self, name)
        ]
        if self.inner_dim not in (None, self.width):
            problems.append(
                f"backbone: inner_dim is {self.inner_dim}; it must be num_attention_heads * attention_head_dim = "
                f"{self.width}"
            )
        if self.in_channels != self.patch_size**2 * self.out_channels:
            problems.append(
                f"backbone: in_channels is {self.in_channels}; it must be patch_size^2 * out_channels = "
                f"{self.patch_size**2 * self.out_channels}"
            )
        axes = self.axes_dims_rope
        if len(axes) != 3 or any(d % 2 for d in axes) or sum(axes) != self.attention_head_dim:
            problems.append(
                f"backbone: axes_dims_rope is {list(axes)}; it must be three even numbers that add up to "
                f"attention_head_dim = {self.attention_head_dim}"
            )
        if problems:
            raise ConfigError(problems)

    @property
    def width(self) -> int:
        """D."""
        return self.num_attention_heads * self.attention_head_dim

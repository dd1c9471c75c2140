"""The numbers of a LLaVA model: everything that decides its shape and what its token ids mean.

A checkpoint's config.json leaves most of them out and relies on the defaults of the classes that
wrote them, so those defaults live here, once (checkpoint/config_json.py reads the files).
"""

from dataclasses import dataclass

IMAGE_TOKEN_INDEX = -200
"""The id that stands for one picture in `input_ids`. Negative, so that it can never be a word: the
splice replaces it with the picture's patches before anything looks it up (LLaVA, constants.py)."""

IGNORE_INDEX = -100
"""The label of a position that the loss leaves out."""

# What early LLaVA put around each picture, and a token that it added and no prompt contains.
IM_START, IM_END, IM_PATCH = "<im_start>", "<im_end>", "<im_patch>"


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower, CLIP or SigLIP. The defaults, which a config.json means by the fields it
    leaves out, are those of transformers' CLIPVisionConfig (ViT-B/32)."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    num_channels: int = 3
    layer_norm_eps: float = 1e-5
    siglip: bool = False  # no class token, no norm before the blocks, another GELU (vision.py)

    @property
    def num_patches(self) -> int:
        """Patches per picture: (336 / 14)² = 24 × 24 = 576 for LLaVA-1.5."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_positions(self) -> int:
        """The patches, and CLIP's class token."""
        return self.num_patches + (not self.siglip)


CLIP_LARGE_336 = VisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
"""The tower of every LLaVA-1.5, meant when `vision_config` is absent."""


@dataclass(frozen=True)
class TextConfig:
    """The language model, Llama or a relative. The defaults are those of LlamaConfig."""

    # 32064 on the hub: <image>, <pad>, and unused rows up to a multiple of 64
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = None  # type: ignore[assignment]  # None: as many as attention heads
    head_dim: int = None  # type: ignore[assignment]  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_factor: float = 1.0  # "linear" rope scaling: positions are divided by it
    tie_word_embeddings: bool = False  # True: the head is the embedding table
    qkv_bias: bool = False  # Qwen2 adds a bias to queries, keys and values

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)

    @property
    def context(self) -> int:
        """Positions that prompt and answer may take: those of the training, times rope_factor."""
        return int(self.max_position_embeddings * self.rope_factor)


@dataclass(frozen=True)
class LlavaConfig:
    """Everything that decides the network's shape and what its token ids mean."""

    vision: VisionConfig
    text: TextConfig
    # of the tower's hidden states: -2 is after the last block but one; several go side by side
    feature_layer: int | tuple[int, ...] = -2
    keep_class_token: bool = False
    projector_layers: int = 2  # 1: `linear`; N: `mlpNx_gelu`
    projector_bias: bool = True
    projector_norm_eps: float = 0.0  # above 0: ViP-LLaVA's layer norm before the projector
    image_token_id: int = 32000  # the hub dialect's id for <image>; ours is IMAGE_TOKEN_INDEX
    eos_token_ids: tuple[int, ...] = (2,)
    pad_token_id: int = 2
    image_aspect_ratio: str = "pad"
    # LLaVA-1.6: the canvases that are cut into tiles, (height, width); none for 1.5 (tiles/)
    grid: tuple[tuple[int, int], ...] = ()
    most_tiles: int = 0  # LLaVA-OneVision's: a map of more is made smaller (tiles/grid.py)
    template: str = ""  # the one of its kind; "": the added tokens tell (templates.template_of)
    vision_tower_name: str | None = None  # where the original dialect says its tower comes from
    added_tokens: tuple[str, ...] = ()  # IM_PATCH, or IM_START and IM_END
    # True if config.json describes the tower; if not, its tensors do (checkpoint/towers.py)
    vision_stated: bool = True

    @property
    def tokens_per_image(self) -> int:
        """Of a square picture, and of the overview of one that is cut into tiles."""
        return self.vision.num_patches + self.keep_class_token

    def positions(self, tokens: int, pictures: int) -> int:
        """How many a prompt of so many tokens takes once each picture stands where its -200 was; at
        least, if pictures are cut into tiles."""
        return tokens + pictures * (self.tokens_per_image - 1)

    @property
    def feature_depths(self) -> tuple[int, ...]:
        """After how many blocks the features are taken: 23 of 24 for LLaVA-1.5's layer -2."""
        layers, depth = self.feature_layer, self.vision.num_hidden_layers
        layers = (layers,) if isinstance(layers, int) else layers
        return tuple(at if at >= 0 else depth + 1 + at for at in layers)

    @property
    def vision_layers_needed(self) -> int:
        """Blocks that the features need. Nothing would read the others, so they are not built."""
        return max(self.feature_depths)

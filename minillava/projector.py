"""The projector: from the vision tower's width to the language model's, the part trained first.

A picture becomes 576 "words" that were never in any vocabulary. n pictures, P patches, C width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from minillava.config import LlavaConfig


class Projector(nn.Module):
    """`linear` is one layer; `mlpNx_gelu` is N layers with exact (erf) GELU between them.

    The first LLaVA had `linear`; LLaVA-1.5 has mlp2x_gelu, because a second layer improved its
    answers (Liu et al. 2023, Improved Baselines with Visual Instruction Tuning).
    """

    def __init__(self, config: LlavaConfig):
        super().__init__()
        width = config.text.hidden_size
        self.num_layers = config.projector_layers
        features = config.vision.hidden_size * len(config.feature_depths)
        eps = config.projector_norm_eps  # ViP-LLaVA's
        self.projector_layernorm = nn.LayerNorm(features, eps=eps) if eps else nn.Identity()
        for i in range(self.num_layers):
            before = features if i == 0 else width
            self.add_module(f"linear_{i + 1}", nn.Linear(before, width, bias=config.projector_bias))

    def forward(self, features: Tensor) -> Tensor:
        """[n, P, C_vision] -> [n, P, C]"""
        x = self.get_submodule("linear_1")(self.projector_layernorm(features))
        for i in range(1, self.num_layers):
            x = self.get_submodule(f"linear_{i + 1}")(F.gelu(x))
        return x

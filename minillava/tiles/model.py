"""The network of LLaVA-1.6 and OneVision: LLaVA-1.5's, and how the features of tiles become one row
of vectors.

n pictures, k tiles of one besides the overview, R their side in pixels, P patches of each, G = √P,
C width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillava.config import LlavaConfig
from minillava.llava import Llava, Spliced
from minillava.tiles.grid import Size, best_canvas, kept_patches
from minillava.tiles.pictures import Tiled


class TiledLlava(Llava):
    """A Llava that takes pictures as tiles, and squares, too: a square is an overview alone."""

    def __init__(self, config: LlavaConfig, attend: Callable[..., Any]):
        super().__init__(config, attend)
        # what ends each row of patches, as "\n" ends a line
        self.image_newline = nn.Parameter(torch.zeros(config.text.hidden_size))  # [C]

    def encode_images(self, images: Tensor | Sequence[Tiled]) -> Any:
        """Tiled pictures -> n times [positions, C], all tiles through the tower at once; squares
        [n,3,R,R] -> [n,P+1,C]."""
        if isinstance(images, Tensor):
            features = super().encode_images(images)  # [n, P, C]
            end = self.image_newline.to(features.dtype).expand(len(features), 1, -1)
            return torch.cat([features, end], 1)
        if not images:
            return []
        pixels = torch.cat([each.pixels for each in images]).to(self.image_newline.device)
        features = super().encode_images(pixels)  # [n times 1+k, P, C]
        each_one = features.split([len(each.pixels) for each in images])
        return [self.pack(some, each.size) for some, each in zip(each_one, images, strict=True)]

    def pack(self, features: Tensor, size: Size | None) -> Tensor:
        """The features of one picture [1+k,P,C] -> [positions,C]: the overview, then the tiles put
        together to one map, row by row, without padding, each row with its end. size None: a square
        and its end."""
        if size is None:
            return torch.cat([features[0], self.image_newline.to(features.dtype)[None]])
        vision, (tall, wide) = self.config.vision, best_canvas(size, self.config.grid)
        patches = vision.image_size // vision.patch_size  # G
        rows, columns = tall // vision.image_size, wide // vision.image_size
        whole = features[1:].view(rows, columns, patches, patches, -1)
        # [rows, columns, G, G, C] -> [rows G, columns G, C]
        whole = whole.transpose(1, 2).reshape(rows * patches, columns * patches, -1)
        kept = kept_patches(size, *whole.shape[:2])
        whole = whole[kept.top : kept.bottom, kept.left : kept.right]
        small = kept.shrunk(self.config.most_tiles, patches)
        if small != kept:
            whole = shrink(whole, (small.rows, small.columns))
        end = self.image_newline.to(whole.dtype).expand(len(whole), 1, -1)
        lines = torch.cat([whole, end], 1)  # [r, c + 1, C]
        return torch.cat([features[0], lines.flatten(0, 1)])

    def splice(
        self,
        input_ids: Tensor | Sequence[Sequence[int]],
        images: Any = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | Sequence[Sequence[int]] | None = None,
    ) -> Spliced:
        """As Llava's; images may be what TileProcessor made, too."""
        if isinstance(images, (list, tuple)) and all(isinstance(each, Tiled) for each in images):
            images = self.encode_images(images)
        return super().splice(input_ids, images, attention_mask, labels)


def shrink(map_: Tensor, size: Size) -> Tensor:
    """A map [r,c,C] -> [*size,C], each vector a mean of the four that are nearest to its place. The
    channels come first while it is done, which decides the last digits."""
    channels = map_.permute(2, 0, 1)[None].contiguous()  # [1, C, r, c]
    return F.interpolate(channels, size, mode="bilinear")[0].permute(1, 2, 0)


def network(config: LlavaConfig, attend: Callable[..., Any]) -> Llava:
    """The network of a config: with tiles if it has canvases for them."""
    return (TiledLlava if config.grid else Llava)(config, attend)

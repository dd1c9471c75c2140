"""Which layers run, what is selected, and CLIP's own GELU; values against Hugging Face are in the
parity tests."""

import pytest
import torch
import torch.nn.functional as F
from bounds import assert_same_in_float64

from minillava.attention import eager
from minillava.config import LlavaConfig, TextConfig, VisionConfig
from minillava.projector import Projector
from minillava.vision import VisionTower, quick_gelu

pytestmark = pytest.mark.numeric

VISION = VisionConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
)
TEXT = TextConfig(hidden_size=12, num_attention_heads=2)


def tower(**settings):
    torch.manual_seed(0)
    made = VisionTower(LlavaConfig(VISION, TEXT, **settings), eager)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


@pytest.mark.parametrize(("layer", "blocks"), [(-1, 4), (-2, 3), (3, 3), (1, 1), (0, 0), (-5, 0)])
def test_only_the_needed_blocks_exist(layer, blocks):
    """LLaVA reads the last layer but one: counted from the wrong end, or with the embeddings
    left out, it is another layer's features."""
    assert len(tower(feature_layer=layer).encoder.layers) == blocks


def test_a_shallower_selection_is_the_same_network_cut_short():
    """Blocks that are not built must change nothing before them."""
    pixels = torch.randn(2, 3, 28, 28)
    whole, cut = tower(feature_layer=-1), tower(feature_layer=-2)
    cut.load_state_dict(
        {k: v for k, v in whole.state_dict().items() if not k.startswith("encoder.layers.3.")}
    )
    seen = []
    whole.encoder.layers[2].register_forward_hook(lambda *args: seen.append(args[2]))
    whole(pixels)
    assert torch.equal(cut(pixels), seen[0][:, 1:])


def test_the_class_token_is_dropped_or_kept():
    """It stands first: dropped at the other end, every patch is off by one."""
    pixels = torch.randn(1, 3, 28, 28)
    patches, everything = tower()(pixels), tower(keep_class_token=True)(pixels)
    assert (patches.shape, everything.shape) == ((1, 4, 16), (1, 5, 16))
    assert torch.equal(everything[:, 1:], patches)


def test_a_picture_is_encoded_the_same_alone_and_in_a_batch():
    """Patches that attend across pictures would see their neighbours in the batch."""
    pixels, t = torch.randn(3, 3, 28, 28).double(), tower().double()
    assert_same_in_float64(t(pixels)[1:2], t(pixels[1:2]))


def test_patches_run_row_by_row_from_the_top_left():
    """Flattened by columns, the picture is mirrored along its diagonal, and answers stay fluent."""
    pixels, t = torch.zeros(1, 3, 28, 28), tower(feature_layer=0)
    plain = t(pixels)
    pixels[:, :, :14, 14:] = 1.0  # the upper right quarter
    changed = (t(pixels) != plain).any(-1)[0]
    assert changed.tolist() == [False, True, False, False]


@pytest.mark.parametrize("shape", [(1, 3, 28, 42), (3, 28, 28), (1, 1, 28, 28)])
def test_other_sizes_are_refused(shape):
    """A convolution takes any size, and the position table would be the first to object, if at
    all."""
    with pytest.raises(ValueError, match=r"expected \[n, 3, 28, 28\]"):
        tower()(torch.zeros(shape))


def test_quick_gelu_is_not_gelu():
    """CLIP was trained with x · sigmoid(1.702 x), which is up to 0.02 away from GELU: too little
    to see in one layer."""
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    assert_same_in_float64(quick_gelu(x), x / (1 + torch.exp(-1.702 * x)))
    assert 0.01 < (quick_gelu(x) - F.gelu(x)).abs().max() < 0.03


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_projector_is_linear_layers_with_exact_gelu_between(layers):
    """Here it is GELU itself, neither CLIP's nor the approximation by tanh, and none after the
    last layer."""
    projector = Projector(LlavaConfig(VISION, TEXT, projector_layers=layers)).double()
    x = torch.randn(2, 4, 16, dtype=torch.float64)
    weights = [(projector.get_parameter(f"linear_{i}.weight"), projector.get_parameter(f"linear_{i}.bias"))
               for i in range(1, layers + 1)]  # fmt: skip
    y = x @ weights[0][0].T + weights[0][1]
    for weight, bias in weights[1:]:
        y = (0.5 * y * (1 + torch.erf(y / 2**0.5))) @ weight.T + bias
    assert_same_in_float64(projector(x), y)
    assert len(list(projector.parameters())) == 2 * layers


def test_projector_without_bias():
    """Newer checkpoints store none: a bias of zeros would be a missing key."""
    projector = Projector(LlavaConfig(VISION, TEXT, projector_bias=False))
    assert [name for name, _ in projector.named_parameters()] == [
        "linear_1.weight",
        "linear_2.weight",
    ]

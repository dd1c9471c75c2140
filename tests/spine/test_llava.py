"""The splice, padding, the loss and the cache on a tiny random model; the parity tests compare with
Hugging Face."""

import pytest
import torch
import torch.nn.functional as F
from bounds import assert_same_in_float64
from models import TINY_TEXT, TINY_VISION, tiny

from minillava.attention import ATTENTION
from minillava.cache import KVCache
from minillava.llava import next_token_loss

pytestmark = pytest.mark.numeric

P = TINY_VISION.num_patches  # 4
# No picture, one, two, and a text that ends with one; pictures are taken in row order.
ROWS = [[1, 5, 6], [1, -200, 7, 8, 9], [1, -200, 7, -200, 9, 3], [2, -200]]
PICTURES = torch.randn(
    4, 3, 28, 28, generator=torch.Generator().manual_seed(1), dtype=torch.float64
)
PER_ROW = [PICTURES[:0], PICTURES[:1], PICTURES[1:3], PICTURES[3:]]


@pytest.fixture(params=ATTENTION)
def model(request):
    with torch.no_grad():
        yield tiny(attend=ATTENTION[request.param])


def test_the_splice_puts_each_picture_in_its_place(model):
    """Pictures are taken in row order, also where a row before has none or two."""
    spliced = model.splice(ROWS, PICTURES)
    assert spliced.embeds.shape == (4, 6 + 2 * (P - 1), 32)
    features, words = model.encode_images(PICTURES), model.language_model.embed_tokens
    row = spliced.embeds[2]  # the longest, so without padding: id, picture 1, id, picture 2, id, id
    expected = [
        words(torch.tensor([1])),
        features[1],
        words(torch.tensor([7])),
        features[2],
        words(torch.tensor([9, 3])),
    ]
    assert_same_in_float64(row, torch.cat(expected))
    assert spliced.padding_mask.sum(-1).tolist() == [3, 4 + P, 4 + 2 * P, 1 + P]
    assert spliced.padding_mask[0].tolist() == [False] * 9 + [True] * 3


def test_image_spans_point_at_the_pictures(model):
    """Left padding moves them, and heat maps are drawn from what stands there."""
    spliced = model.splice(ROWS, PICTURES)
    assert spliced.image_spans == [[], [(5, 9)], [(1, 5), (6, 10)], [(8, 12)]]
    features = iter(model.encode_images(PICTURES))
    for embeds, spans in zip(spliced.embeds, spliced.image_spans, strict=True):
        for start, end in spans:
            assert_same_in_float64(embeds[start:end], next(features))


def test_ids_stand_where_their_vectors_do(model):
    """Penalties, n-grams and a chat's cache each expanded the ids on their own."""
    mask = [[0, 1, 1], [1] * 5, [1] * 6, [1] * 2]
    spliced, image = model.splice(ROWS, PICTURES, mask), [model.config.image_token_id] * P
    assert spliced.token_ids.tolist() == [
        [-1] * (2 * P + 2) + [5, 6],
        [-1] * P + [1, *image, 7, 8, 9],
        [1, *image, 7, *image, 9, 3],
        [-1] * (P + 3) + [2, *image],
    ]
    assert torch.equal(spliced.token_ids >= 0, spliced.padding_mask)


def test_pictures_may_take_different_numbers_of_positions(model):
    """As they do where a picture is cut into as many tiles as its shape asks for."""
    features = model.encode_images(PICTURES)
    several = [features[0], features[1][:2], torch.cat([features[2], features[2]]), features[3]]
    spliced = model.splice(ROWS, several)
    assert spliced.image_spans == [[], [(7, 11)], [(1, 3), (4, 12)], [(10, 14)]]
    for row, spans in enumerate(spliced.image_spans):
        for start, end in spans:
            found = spliced.embeds[row, start:end]
            assert torch.equal(found, several.pop(0))
            assert set(spliced.token_ids[row, start:end].tolist()) == {model.config.image_token_id}
    one = model.splice([ROWS[2]], [features[1][:2], torch.cat([features[2], features[2]])])
    assert torch.equal(one.embeds[0], spliced.embeds[2])
    assert torch.equal(
        model.splice(ROWS, list(features)).embeds, model.splice(ROWS, PICTURES).embeds
    )


def test_rows_without_padding_need_no_mask(model):
    """With one, an unpadded batch would leave the causal path."""
    assert model.splice([[1, 5], [1, 6]]).padding_mask is None


def test_a_batch_equals_its_rows_alone(model):
    """Padding on the left shifts positions, and is there to be attended to: a shorter row must
    notice neither."""
    together = model(ROWS, PICTURES)
    for i, (row, pictures) in enumerate(zip(ROWS, PER_ROW, strict=True)):
        alone = model([row], pictures).logits[0]
        assert_same_in_float64(together.logits[i, -len(alone) :], alone)


def test_padding_in_the_input_stays_where_it_is(model):
    """Who pads on the right gets logits at the positions that were given, not moved to the left."""
    alone = model([[1, -200, 7]], PICTURES[:1]).logits[0]
    right = model(
        torch.tensor([[1, -200, 7, 0, 0]]),
        PICTURES[:1],
        attention_mask=torch.tensor([[1, 1, 1, 0, 0]]),
    )
    assert_same_in_float64(right.logits[0, : len(alone)], alone)
    left = model(
        torch.tensor([[0, 0, 1, -200, 7]]),
        PICTURES[:1],
        attention_mask=torch.tensor([[0, 0, 1, 1, 1]]),
    )
    assert_same_in_float64(left.logits[0, 2:], alone)
    assert left.image_spans == [[(3, 7)]]


def test_cached_decoding_equals_uncached_token_by_token(model):
    """A cache that is off by one position still gives fluent answers."""
    row, new = [1, -200, 7, 8], [9, 3, 4, 11]
    cache = KVCache(TINY_TEXT, 1, 3 + P + len(new), dtype=torch.float64, device="cpu")
    cached = [model([row], PICTURES[:1], cache=cache).logits[:, -1]]
    cached += [model([[token]], cache=cache).logits[:, -1] for token in new]
    for n in range(len(new) + 1):
        assert_same_in_float64(cached[n], model([row + new[:n]], PICTURES[:1]).logits[:, -1])


def test_cached_decoding_of_a_padded_batch_equals_its_rows_alone(model):
    """The next word is read off each row's own end, and at its own position."""
    new = torch.tensor([[9], [3], [4], [11]])
    cache = KVCache(TINY_TEXT, 4, 20, dtype=torch.float64, device="cpu")
    model(ROWS, PICTURES, cache=cache)
    together = model(new, cache=cache).logits[:, -1]
    for i, (row, pictures) in enumerate(zip(ROWS, PER_ROW, strict=True)):
        assert_same_in_float64(together[i], model([row + new[i].tolist()], pictures).logits[0, -1])


def test_several_tokens_behind_a_cache(model):
    """A chat's next question comes as many tokens at once, whose mask starts behind what was
    read."""
    cache = KVCache(TINY_TEXT, 1, 20, dtype=torch.float64, device="cpu")
    model([[1, 5, 6]], cache=cache)
    assert_same_in_float64(
        model([[7, 8, 9]], cache=cache).logits, model([[1, 5, 6, 7, 8, 9]]).logits[:, 3:]
    )


def test_a_truncated_cache_continues_as_if_the_rest_had_never_been(model):
    """Keys that were cut off but still attended to belong to another conversation."""
    cache = KVCache(TINY_TEXT, 1, 20, dtype=torch.float64, device="cpu")
    model([[1, 5, 6, 7, 8]], cache=cache)
    cache.truncate(3)
    assert_same_in_float64(
        model([[9]], cache=cache).logits[:, -1], model([[1, 5, 6, 9]]).logits[:, -1]
    )


def test_two_generations_on_one_model_interleave(model):
    """State on a layer instead of in the cache would mix the two."""
    prompts, caches = (
        ([1, 5, 6], [2, 8]),
        [KVCache(TINY_TEXT, 1, 9, dtype=torch.float64, device="cpu") for _ in range(2)],
    )
    mixed = [[], []]
    for token in (None, 11, 12, 13):
        for i in (0, 1):
            mixed[i].append(
                model([prompts[i] if token is None else [token]], cache=caches[i]).logits[:, -1]
            )
    for prompt, logits in zip(prompts, mixed, strict=True):
        assert_same_in_float64(
            torch.cat(logits), model([[*prompt, 11, 12, 13]]).logits[0, len(prompt) - 1 :]
        )


def test_any_embeddings_can_be_a_prefix(model):
    """40 vectors of another system's bridge, then a word: the same cache serves both."""
    prefix = torch.randn(1, 40, 32, dtype=torch.float64)
    cache = KVCache(TINY_TEXT, 1, 41, dtype=torch.float64, device="cpu")
    model.language_model(prefix, cache=cache)
    word = torch.tensor([[7]])
    whole = torch.cat([prefix, model.language_model.embed_tokens(word)], dim=1)
    assert_same_in_float64(
        model.language_model(word, cache=cache).logits[:, -1],
        model.language_model(whole).logits[:, -1],
    )


def test_labels_move_with_the_splice_and_pictures_are_never_predicted(model):
    """A picture takes P positions where the labels have one: not moved, every label trains
    another word."""
    labels = [[-100, 5, 6], [-100, -100, -100, 8, 9], [-100, 44, 7, -200, 9, 3], [-100, -100]]
    spliced = model.splice(ROWS, PICTURES, labels=labels)
    assert spliced.labels[2].tolist() == [-100] + [-100] * P + [7] + [-100] * P + [9, 3]
    assert spliced.labels[1].tolist() == [-100] * (4 + P + 2) + [8, 9]


def test_the_loss_is_the_mean_over_what_is_not_ignored(model):
    """A mean row by row would weigh short answers more; labels that are not shifted would train
    the model to repeat."""
    labels = [[-100, 5, 6], [-100, -100, -100, 8, 9], [-100, -100, 7, -100, 9, 3], [-100, -100]]
    out = model(ROWS, PICTURES, labels=labels)
    log_p = out.logits.log_softmax(-1)
    last = out.logits.shape[1] - 1
    wanted = [(0, last - 2, 5), (0, last - 1, 6), (1, last - 2, 8), (1, last - 1, 9),
              (2, P, 7), (2, last - 2, 9), (2, last - 1, 3)]  # fmt: skip
    assert_same_in_float64(out.loss, -torch.stack([log_p[b, t, v] for b, t, v in wanted]).mean())
    assert model(ROWS, PICTURES).loss is None


def test_the_loss_reaches_every_parameter():
    """A detached picture leaves tower and projector untrained, and the loss still falls."""
    model = tiny()
    model([[1, -200, 7]], PICTURES[:1], labels=[[1, -100, 7]]).loss.backward()
    assert [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()
    ] == []


def test_a_loss_over_nothing_is_refused():
    """The mean of nothing is NaN, and one such batch spoils the weights."""
    with pytest.raises(ValueError, match="every label is ignored"):
        # the first is never predicted
        next_token_loss(torch.zeros(1, 3, 5), torch.tensor([[7, -100, -100]]))


def test_half_precision_loss_is_taken_in_float32():
    """A sum of 32,000 exponentials in bfloat16 has two digits."""
    logits = torch.randn(1, 4, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.tensor([[1, 2, 3, 4]])
    expected = F.cross_entropy(logits[0, :-1].float(), labels[0, 1:])
    torch.testing.assert_close(next_token_loss(logits, labels), expected)


@pytest.mark.parametrize(
    ("rows", "pictures", "message"),
    [
        ([[1, -200]], 2, "place 1 picture.* but 2 were given"),
        ([[1, -200, -200], [1, -200]], 1, "place 3 picture.* but 1 were given"),
        ([[1, 2]], 1, "place 0 picture.* but 1 were given"),
        ([[1, -200]], 0, "place 1 picture.* but 0 were given"),
        ([[1, 50]], 0, "token id 50 is outside this model's vocabulary of 50"),
        ([[1, -100]], 0, "token id -100 is outside"),
        ([[1], []], 0, "empty row"),
        ([], 0, "no row"),
    ],
)
def test_wrong_input_is_named(model, rows, pictures, message):
    """A surplus picture would be left out, and an id outside the vocabulary is an assertion on
    the GPU that ends the process."""
    with pytest.raises(ValueError, match=message):
        model(rows, PICTURES[:pictures] if pictures else None)


def test_wrong_lengths_are_named(model):
    """Shorter labels would be broadcast or cut."""
    with pytest.raises(ValueError, match=r"labels has rows of \[2\] tokens, input_ids of \[3\]"):
        model([[1, 2, 3]], labels=[[1, 2]])
    with pytest.raises(
        ValueError, match=r"attention_mask has rows of \[4\] tokens, input_ids of \[3\]"
    ):
        model(torch.tensor([[1, 2, 3]]), attention_mask=torch.ones(1, 4))


def test_wrong_pictures_labels_and_ranks_are_named(model):
    """One picture without its batch dimension reads as three of one channel."""
    with pytest.raises(
        ValueError, match=r"images are \[3, 28, 28\], expected a tensor \[n, 3, R, R\]"
    ):
        model([[1, -200]], PICTURES[0])
    with pytest.raises(ValueError, match=r"images are list of \[\[3, 28, 28\]\], expected"):
        model([[1, -200]], [PICTURES[0]])
    with pytest.raises(ValueError, match=r"images are \[1, 4, 16\], .*\[n, P, 32\]"):
        model([[1, -200]], torch.zeros(1, 4, 16))
    for other in ("a.png", [0.5], [torch.zeros(0, 32)]):
        with pytest.raises(ValueError, match=r"images are (str|list)( of .*)?, expected"):
            model([[1, -200]], other)
    with pytest.raises(ValueError, match="label 50 is outside"):
        model([[1, 2]], labels=[[1, 50]])
    with pytest.raises(ValueError, match="input_ids has rows of shape"):
        model(torch.zeros(1, 2, 3, dtype=torch.long))


def test_one_flat_row_is_a_batch_of_one(model):
    """A list of ids is what tokenizers return."""
    assert_same_in_float64(model([1, 5, 6]).logits, model([[1, 5, 6]]).logits)
    assert_same_in_float64(model(torch.tensor([1, 5, 6])).logits, model([[1, 5, 6]]).logits)


def test_the_last_block_of_the_tower_and_its_final_norm_are_not_built(model):
    """They would be computed for nothing, and their weights kept in memory."""
    assert len(model.vision_tower.encoder.layers) == TINY_VISION.num_hidden_layers - 1
    assert not any("post_layernorm" in name for name, _ in model.named_parameters())

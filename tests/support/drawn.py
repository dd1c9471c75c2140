"""Random small models of every kind that transformers' Llava classes have, and prompts for them."""

import random

import hf

KINDS = ("plain", "grouped", "multi-query", "tied", "linear", "mistral", "qwen2")
KINDS += ("interleave", "vip")


def draw_config(kind: str, choose: random.Random) -> dict:
    """A hub config.json with sizes that nobody chose.

    Widths are whole cache lines of 16 float32: where a row starts in memory decides the last bit
    that MKL gives it, and a cache of ours starts its rows elsewhere than transformers' does.
    """
    heads, vision_heads = choose.choice([4, 6]), choose.choice([1, 2, 3])
    patch = choose.choice([7, 8, 14])
    text = {
        "hidden_size": heads * choose.choice([16, 32]),
        "intermediate_size": 16 * choose.randrange(3, 20),
        "num_attention_heads": heads,
        "num_hidden_layers": choose.choice([2, 3]),
        "rms_norm_eps": choose.choice([1e-5, 1e-6]),
        "rope_theta": choose.choice([10000.0, 500000.0]),
    }
    if kind in ("grouped", "multi-query"):
        text["num_key_value_heads"] = heads // 2 if kind == "grouped" else 1
    if kind == "mistral":
        text |= {"model_type": "mistral", "num_key_value_heads": heads // 2, "sliding_window": 256}
    if kind in ("qwen2", "interleave"):
        text |= {"model_type": "qwen2", "num_key_value_heads": heads // 2}
    if kind == "linear":
        text["rope_scaling"] = {"type": "linear", "factor": choose.choice([2.0, 3.0])}
    vision = {
        "hidden_size": vision_heads * choose.choice([16, 32]),
        "image_size": patch * choose.randrange(2, 6),
        "intermediate_size": 16 * choose.randrange(2, 10),
        "num_attention_heads": vision_heads,
        "num_hidden_layers": choose.choice([2, 3, 4]),
        "patch_size": patch,
    }
    top = {"tie_word_embeddings": kind in ("tied", "interleave")}
    if kind == "interleave":
        vision |= hf.SIGLIP
        top |= hf.OF_SIGLIP
    if kind == "vip":
        vision["num_hidden_layers"] = 4
        top |= {"model_type": "vipllava", "vision_feature_layers": [-2, -4, 1, 4]}
        top |= {"projector_layernorm_eps": 1e-5}
    return hf.hub_config(text, vision, pieces=choose.randrange(440, 640), **top)


def draw_rows(pictures: list[int], words: int, choose: random.Random) -> list[list[int]]:
    """One row of ids for each entry of `pictures`, with that many -200 anywhere after the begin
    token."""
    rows = []
    for n in pictures:
        row = [choose.randrange(3, words) for _ in range(choose.randrange(4, 20))] + [hf.IMAGE] * n
        choose.shuffle(row)
        rows.append([1, *row])
    return rows

"""Whole folders as transformers saves the relatives of LLaVA-1.5: their own tokenizer, pictures,
chat template and answers, against those of minillava."""

import functools
import json
import shutil

import hf
import pytest
import torch
from paths import REFERENCE
from PIL import Image
from tiled import onevision_config

import minillava
from minillava.chat import Conversation
from minillava.cli.doors import enter
from minillava.generate.generation import generate
from minillava.inspection.report import inspect_folder
from minillava.templates import TEMPLATES
from minillava.tiles.pictures import positions_of

transformers = pytest.importorskip(
    "transformers", minversion="5", reason="live parity needs transformers 5"
)
tokenizers = pytest.importorskip("tokenizers", reason="the tokenizer is made with tokenizers")

pytestmark = [pytest.mark.numeric, pytest.mark.parity]

load = functools.partial(minillava.load, device="cpu", attention="eager")

# the patterns by which Qwen2 and Llama 3 cut words
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
CORPUS = ["Describe the image briefly.", "Compare the two images briefly.", "system user assistant"]
QUESTIONS = ["Describe the image briefly.", "Wie viele Sterne? 星 <|im_end|> 1234"]
PICTURES = [REFERENCE / "pictures" / f"{name}.png" for name in ("landscape", "portrait", "strip")]

# the chat templates of llava-interleave-qwen and of llama3-llava-next, for turns as below
CHAT = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% for c in m['content'] if c['type'] == 'image' %}<image>{% endfor %}"
        "{% for c in m['content'] if c['type'] == 'text' %}{{ '\n' + c['text'] }}{% endfor %}"
        "<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' }}"
    ),
    "llama_3": (
        "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{% for c in m['content'] if c['type'] == 'image' %}<image>\n{% endfor %}"
        "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}"
        "<|eot_id|>{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    ),
}
CHAT["chatml_lines"] = (  # of LLaVA-OneVision
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] if c['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' }}"
)
SPECIAL = {
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"],
    "llama_3": [
        *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
        *("<|eot_id|>", "<image>", "<pad>"),
    ],
}
SPECIAL["chatml_lines"] = [*SPECIAL["chatml"], "<video>"]


class WithoutVideos(transformers.LlavaOnevisionProcessor):
    """Those need torchvision."""

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]


def tokenizer_of(kind: str):
    """A byte-level tokenizer of Qwen2's or Llama 3's form, small."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    before = tokenizers.pre_tokenizers
    split = before.Split(tokenizers.Regex(LLAMA_3 if kind == "llama_3" else QWEN2), "isolated")
    level = before.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = before.Sequence([split, level])
    made.decoder = tokenizers.decoders.ByteLevel()
    if kind != "llama_3":
        made.normalizer = tokenizers.normalizers.NFC()
    letters = before.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS,
        tokenizers.trainers.BpeTrainer(
            vocab_size=320, initial_alphabet=letters, show_progress=False
        ),
    )
    made.add_special_tokens(SPECIAL[kind])
    first = SPECIAL[kind][0]
    if kind == "llama_3":
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, made.token_to_id(first))]
        )
    ends = {
        "eos_token": SPECIAL[kind][4 if kind == "llama_3" else 2],
        "pad_token": SPECIAL[kind][0],
    }
    if kind == "llama_3":
        ends |= {"bos_token": first, "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **ends)


def config_of(kind: str, tokens: int) -> dict:
    """config.json of a small llava-interleave-qwen, LLaVA-OneVision or xtuner/llava-llama-3-8b."""
    if kind == "chatml_lines":
        return onevision_config(tokens - 2)
    toy = hf.SIZES["toy"]
    text, vision, top = dict(toy["text"]), dict(toy["vision"]), {}
    text |= {"num_key_value_heads": 2, "rope_theta": 1e6 if kind == "chatml" else 5e5}
    if kind == "chatml":
        text |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
        vision |= hf.SIGLIP
        top = {"tie_word_embeddings": True, **hf.OF_SIGLIP}
    image = tokens - 1 if kind == "chatml" else tokens - 2
    config = hf.hub_config(text, vision, pieces=image, **top)
    if kind == "chatml":  # its table has hundreds of rows without a token
        config["text_config"]["vocab_size"] = config["vocab_size"] = tokens + 353
    return config


@pytest.fixture(scope="module", params=CHAT)
def saved(request, tmp_path_factory):
    """A folder that transformers alone has written, the kind, and transformers' processor."""
    kind = request.param
    folder, tokenizer = tmp_path_factory.mktemp(kind), tokenizer_of(kind)
    config = config_of(kind, len(tokenizer))
    end = tokenizer.convert_tokens_to_ids(tokenizer.eos_token)
    model = hf.model_of(config, hf.random_state(config, seed=3), "float32")
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = config["pad_token_id"]
    model.save_pretrained(folder)
    size = config["vision_config"]["image_size"]
    if kind == "chatml":
        from transformers.models.siglip.image_processing_pil_siglip import (
            SiglipImageProcessorPil as Pictures,
        )

        pictures = Pictures(size={"height": size, "width": size})
    elif kind == "chatml_lines":
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil as Pictures,
        )

        pictures = Pictures(
            size={"height": size, "width": size},
            image_grid_pinpoints=config["image_grid_pinpoints"],
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )
    else:
        from transformers.models.clip.image_processing_pil_clip import (
            CLIPImageProcessorPil as Pictures,
        )

        sides = {"height": size, "width": size}
        pictures = Pictures(size={"shortest_edge": size}, crop_size=sides)
    more = {
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
        "chat_template": CHAT[kind],
    }
    if kind == "chatml_lines":
        more |= {"num_image_tokens": 16, "vision_aspect_ratio": config["vision_aspect_ratio"]}
        processor = WithoutVideos(pictures, tokenizer, **more)
    else:
        processor = transformers.LlavaProcessor(
            pictures,
            tokenizer,
            patch_size=config["vision_config"]["patch_size"],
            num_additional_image_tokens=int(kind != "chatml"),
            **more,
        )
    processor.save_pretrained(folder)
    return folder, kind, processor, end


def asked_as_transformers(processor, question: str, pictures: list) -> dict:
    """What transformers' processor makes of a question about pictures."""
    content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}])
    images = [Image.open(picture).convert("RGB") for picture in pictures]
    if isinstance(processor, transformers.LlavaOnevisionProcessor):
        images = [images]  # of one conversation
    return processor(
        images=images or None,
        text=text,
        return_tensors="pt",
    )


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_folder_that_transformers_saved_answers_alike(saved, dtype, count):
    """Prompt, ids, pixels or logits would differ somewhere between the files and the answer."""
    folder, kind, processor, _ = saved
    pictures = PICTURES[:count]
    given = asked_as_transformers(processor, QUESTIONS[0], pictures)
    model = hf.load(folder, dtype)
    assistant = load(folder, dtype=dtype, image_aspect_ratio="crop" if kind == "llama_3" else None)
    assert assistant.template is TEMPLATES[kind]
    config = assistant.model.config
    ids = assistant.tokenizer.encode(assistant.prompt(QUESTIONS[0], images=count))
    pixels = assistant.image_processor(pictures)
    counts = iter([positions_of(config, each) for each in pixels])
    wide = [t for i in ids for t in ([config.image_token_id] * next(counts) if i == -200 else [i])]
    assert wide == given["input_ids"][0].tolist()
    shown = given["pixel_values"]
    if kind == "chatml_lines":
        assert torch.equal(torch.stack([each.pixels for each in pixels]), shown)
    else:
        assert torch.equal(pixels, shown)
    with torch.no_grad():
        theirs = model(**{**given, "pixel_values": shown.to(model.dtype)}).logits
        ours = assistant.model([ids], pixels).logits
    assert torch.equal(ours, theirs)
    found = model.generate(
        **given, max_new_tokens=12, do_sample=False, repetition_penalty=1.0, top_k=None
    )[0, given["input_ids"].shape[1] :]
    answer = generate(assistant.model, [ids], pixels, max_new_tokens=12).sequences[0]
    assert answer.tolist() == found.tolist()[: len(answer)]


def test_what_a_user_types_is_text(saved):
    """A user would end the turn by typing its end."""
    folder, kind, _, end = saved
    assistant = load(folder, dtype="float32")
    typed = TEMPLATES[kind].stop[0]
    ids = assistant.tokenizer.encode(assistant.prompt(f"a {typed} b", images=0))
    assert ids.count(end) == 1 and assistant.tokenizer.decode(ids).count(typed) == 1


@torch.no_grad()
def test_a_batch_is_its_rows_and_a_conversation_keeps_its_cache(saved):
    """Rows of one and of two pictures padded to one length would change each other; so would a
    cache that a second question goes on from."""
    folder, *_ = saved
    assistant = load(folder, dtype="float64")
    asked = [PICTURES[0], PICTURES[1:3]]
    together = assistant.ask(asked, QUESTIONS, max_new_tokens=8)
    alone = [assistant.ask(*pair, max_new_tokens=8) for pair in zip(asked, QUESTIONS, strict=True)]
    assert together == alone
    conversation = Conversation(assistant)
    conversation.add_image(PICTURES[0])
    assert conversation.ask(QUESTIONS[0], max_new_tokens=8) == alone[0]
    assert isinstance(conversation.ask(QUESTIONS[1], max_new_tokens=8), str)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_eight_and_four_bits_keep_the_biases(saved, quantize):
    """A quantised layer without its bias gives other words without an error."""
    folder, kind, *_ = saved
    model = load(folder, dtype="float32", quantize=quantize).model
    layer = model.language_model.layers[0].self_attn.q_proj
    whole = load(folder, dtype="float32").model.language_model.layers[0].self_attn.q_proj
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    assert (layer.bias is None) == (kind == "llama_3")
    dense = layer.dequantise(slice(None), torch.float64)
    bias = 0 if whole.bias is None else whole.bias.double()
    exact = x.double() @ dense.T + bias
    # the kernels round activations to bfloat16: 8 bits each, 64 of them
    allowed = 2**-7 * (x.double().abs() @ dense.abs().T)
    assert ((layer(x).double() - exact).abs() <= allowed).all()


def test_inspect_reads_it(saved):
    """A folder that opens would be called unknown."""
    folder, kind, *_ = saved
    report = inspect_folder(folder)
    assert report.loadable, report.problems
    assert report.template["name"] == kind
    assert json.dumps(report.network)


def test_convert_writes_the_hubs_layout_and_refuses_the_originals(saved, tmp_path, capsys):
    """A copy that says a begin token where there is none would be refused, after hours a LoRA or a
    projector that LLaVA's own config.json cannot describe."""
    folder, kind, *_ = saved
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "tokenizer_config.json").unlink()
    again = tmp_path / "again"
    assert enter("convert", [str(bare), str(again), "--to", "hf"]) == 0
    given = (PICTURES[0], QUESTIONS[0])
    answers = [
        load(each, dtype="float32").ask(*given, max_new_tokens=8) for each in (folder, again)
    ]
    assert answers[0] == answers[1]
    theirs = transformers.AutoTokenizer.from_pretrained(again)
    ours = load(again, dtype="float32").tokenizer
    assert theirs(QUESTIONS[0]).input_ids == ours.encode(QUESTIONS[0])
    if kind == "chatml":
        capsys.readouterr()
        original = tmp_path / "original"
        assert enter("convert", [str(folder), str(original), "--to", "original"]) == 1
        row = {"image": PICTURES[0].name, "conversations": [
            {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A star."}]}  # fmt: skip
        (tmp_path / "rows.json").write_text(json.dumps([row]), encoding="utf-8")
        flags = ["--learn", "projector", "--template", "chatml", "--device", "cpu"]
        learn = [folder, tmp_path / "rows.json", "--images", PICTURES[0].parent, *flags]
        learn = [str(each) for each in (*learn, "--out", tmp_path / "out")]
        assert enter("finetune", learn) == 1
        told = capsys.readouterr().err
        assert told.count("ViP-LLaVA are not written in LLaVA's own layout") == 2
        assert not original.exists() and not (tmp_path / "out").exists()

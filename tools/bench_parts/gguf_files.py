"""The weights of a checkpoint as llama.cpp reads them; bench.py starts this as a process.

    python tools/bench_parts/gguf_files.py FOLDER KIND TARGET

writes TARGET/KIND.gguf, the language model, and TARGET/mmproj.gguf, vision tower and projector in
float16, unless they exist. KIND: bf16, or q8_0 or q4_0, which llama.cpp makes of it.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

# run from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from minillava.checkpoint.config_json import read_config
from minillava.checkpoint.stored import StoredWeights
from minillava.config import LlavaConfig, TextConfig
from minillava.image import ImageProcessor
from minillava.templates import LLAVA_V1, Template
from minillava.tokenizer import Tokenizer

EYE = "mmproj"
LANGUAGE_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
EYE_NAMES = {
    "projector.linear_1": "mm.0",
    "projector.linear_2": "mm.2",
    "vision_tower.embeddings.class_embedding": "v.class_embd",
    "vision_tower.embeddings.patch_embedding": "v.patch_embd",
    "vision_tower.embeddings.position_embedding": "v.position_embd",
    "vision_tower.pre_layrnorm": "v.pre_ln",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
}


def make(folder: Path, kind: str, target: Path) -> None:
    """Make the files that do not exist. Raises RuntimeError for a model that is not of Llama and
    CLIP, and if llama.cpp cannot quantise one."""
    config = read_config(folder)
    if config.vision.siglip or config.text.qkv_bias:
        raise RuntimeError("llama.cpp's files are made here of Llama and CLIP alone")
    target.mkdir(parents=True, exist_ok=True)
    unless_there(target / f"{EYE}.gguf", lambda path: write_eye(folder, path))
    source = target / "bf16.gguf"
    unless_there(source, lambda path: write_language_model(folder, path))
    if kind != "bf16":
        unless_there(target / f"{kind}.gguf", lambda path: quantise(source, kind, path))


def unless_there(path: Path, write: Callable[[Path], None]) -> None:
    """Write under a temporary name first, so that a file that exists is whole."""
    if path.exists():
        return
    partial = path.with_suffix(".partial")
    try:
        write(partial)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def quantise(source: Path, kind: str, path: Path) -> None:
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), settings):
        raise RuntimeError(f"llama.cpp cannot make {kind} of {source}")


def write_language_model(folder: Path, path: Path) -> None:
    import gguf

    checkpoint, text = StoredWeights(folder), read_config(folder).text
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=False)
    describe_language_model(writer, text)
    texts, scores, kinds = vocabulary(folder, text.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types([int(gguf.TokenType[kind]) for kind in kinds])
    writer.add_chat_template(chat_template(LLAVA_V1))
    for name in checkpoint.tensors:
        if not name.startswith("language_model."):
            continue
        layer = re.match(r"language_model\.layers\.(\d+)\.(.*)\.weight", name)
        stem = layer[2] if layer else name.removeprefix("language_model.").removesuffix(".weight")
        tensor = checkpoint.read(name)
        if stem.endswith(("q_proj", "k_proj")):
            tensor = pairs_side_by_side(tensor, text.head_dim)
        prefix = f"blk.{layer[1]}." if layer else ""
        add(writer, f"{prefix}{LANGUAGE_NAMES[stem]}.weight", tensor, "BF16")
    finish(writer)


def describe_language_model(writer, text: TextConfig) -> None:
    import gguf

    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_dimension_count(text.head_dim)
    writer.add_rope_freq_base(text.rope_theta)
    writer.add_vocab_size(text.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def chat_template(template: Template) -> str:
    """A template as llama.cpp's server reads it, in Jinja, for users and assistants in turn."""
    said = "{{ message.content }}"
    return (
        f"{template.system_block.format(template.system)}{{% for message in messages %}}"
        f"{{% if message.role == 'user' %}}{template.user.format(said)}"
        f"{{% else %}}{template.assistant.format(said)}{{% endif %}}{{% endfor %}}"
        f"{template.opening}"
    )


def vocabulary(folder: Path, rows: int) -> tuple[list[str], list[float], list[str]]:
    """The text, the score and llama.cpp's name for the kind of each row of the table. What is no
    piece is spelled in bytes there, and a vocabulary without them ends its process."""
    tokenizer = Tokenizer(folder / "tokenizer.model")
    pieces = tokenizer.sentencepiece
    texts, scores, kinds = [], [], []
    for i in range(rows):
        known = i < tokenizer.vocab_size
        texts.append(tokenizer.piece(i))
        scores.append(pieces.get_score(i) if known else 0.0)
        if not known:
            kinds.append("UNUSED")
        elif pieces.is_unknown(i):
            kinds.append("UNKNOWN")
        elif pieces.is_control(i):
            kinds.append("CONTROL")
        else:
            kinds.append("BYTE" if pieces.is_byte(i) else "NORMAL")
    return texts, scores, kinds


def pairs_side_by_side(weight: Tensor, head_dim: int) -> Tensor:
    """The rows of a head in Meta's order: the two numbers that are rotated together are
    neighbours."""
    heads = weight.view(-1, 2, head_dim // 2, weight.shape[1])
    return heads.transpose(1, 2).reshape(weight.shape)


def write_eye(folder: Path, path: Path) -> None:
    import gguf

    checkpoint, config = StoredWeights(folder), read_config(folder)
    writer = gguf.GGUFWriter(path, "clip", use_temp_file=False)
    layers = describe_eye(writer, config, ImageProcessor(config.vision.image_size))
    for name in checkpoint.tensors:
        layer = re.match(r"vision_tower\.encoder\.layers\.(\d+)\.(.*)", name)
        if name.startswith("language_model.") or "post_layernorm" in name:
            continue
        if layer and int(layer[1]) >= layers:  # which LLaVA does not read
            continue
        stem, dot, kind = (layer[2] if layer else name).rpartition(".")
        if (layer[2] if layer else name) in EYE_NAMES:  # the class embedding is no layer's
            stem, dot, kind = name, "", ""
        prefix = f"v.blk.{layer[1]}." if layer else ""
        tensor = checkpoint.read(name)
        add(
            writer,
            f"{prefix}{EYE_NAMES[stem]}{dot}{kind}",
            tensor,
            "F32" if "position" in name else "F16",
        )
    finish(writer)


def describe_eye(writer, config: LlavaConfig, processor: ImageProcessor) -> int:
    """Write the settings of the vision tower; returns the number of layers that LLaVA reads."""
    vision = config.vision
    layers = config.vision_layers_needed
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.use_gelu", False)  # but the quick one
    writer.add_string("clip.projector_type", "mlp")
    numbers = {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "embedding_length": vision.hidden_size,
        "feed_forward_length": vision.intermediate_size,
        "projection_dim": config.text.hidden_size,
        "attention.head_count": vision.num_attention_heads,
        "block_count": layers,
    }
    for name, number in numbers.items():
        writer.add_uint32(f"clip.vision.{name}", number)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", vision.layer_norm_eps)
    writer.add_array("clip.vision.feature_layer", [layers])
    writer.add_array("clip.vision.image_mean", list(processor.mean))
    writer.add_array("clip.vision.image_std", list(processor.std))
    return layers


def add(writer, name: str, tensor: Tensor, kind: str) -> None:
    """Add a tensor to the file; one of one dimension becomes float32."""
    import gguf

    if tensor.dim() == 1 or kind == "F32":
        writer.add_tensor(name, tensor.float().numpy())
    elif kind == "F16":
        writer.add_tensor(name, tensor.half().numpy())
    else:
        bits = tensor.bfloat16().view(torch.int16).numpy().view("uint8")
        writer.add_tensor(name, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)


def finish(writer) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    make(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))

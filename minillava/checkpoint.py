"""Checkpoint folders to models: which files, which names, which tensors; strict about all three.

Weights are memory-mapped: opening a checkpoint at its own dtype reads nothing until a layer first runs.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor, nn

from minillava.adapter import CONFIG_NAME as ADAPTER_CONFIG_NAME
from minillava.adapter import Adapter, Delta
from minillava.config import CLIP_RELEASE, LlavaConfig, VisionConfig, check_config, read_json
from minillava.files import (
    OtherObjects,
    Stored,
    holds_weights,
    open_file,
    open_folder,
    several_sets,
    weight_files,
)
from minillava.foreign import quantised, refuse_quantised, stated_method
from minillava.llama import grow_rows
from minillava.llava import Llava
from minillava.quantize import PARTS, quantised_layer, quantize_tensor, whole_shape

# Stored prefix -> ours; where several fit, the longest wins. After the prefix, every dialect of LLaVA
# checkpoints uses the same names (`layers.0.self_attn.q_proj.weight`, ...), and so do we.
PREFIXES = {
    # on the hub (llava-hf), and as transformers 4.37 to 4.57 write it
    "language_model.model.": "language_model.",
    "language_model.lm_head.": "language_model.lm_head.",
    "vision_tower.vision_model.": "vision_tower.",
    "multi_modal_projector.": "projector.",
    # transformers 5, saving a model built from a config: as above, but
    "vision_tower.": "vision_tower.",
    # the module names of transformers 4.52 and later (raw state_dict, or save_original_format=False)
    "model.language_model.": "language_model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.vision_model.": "vision_tower.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "projector.",
    # the original LLaVA (and see PROJECTOR)
    "model.": "language_model.",
    "model.vision_tower.vision_tower.vision_model.": "vision_tower.",
    "model.vision_tower.vision_tower.": "vision_tower.",
    "model.mm_projector.": "projector.linear_1.",
    "mm_projector.": "projector.linear_1.",  # as some pre-trains save it alone
}
# The original's projector of one layer has no number, one of N has 0, 2, 4, ...: between them stand the GELUs.
PROJECTOR = re.compile(r"(?:model\.)?mm_projector\.(\d*[02468])\.")
CLIP_PREFIXES = {"vision_model.": "vision_tower.", "": "vision_tower."}  # a CLIP folder of its own

CLIP_DEPTHS = {768: 12, 1024: 24}  # width -> blocks of OpenAI's ViT-B and ViT-L
OTHER_TOWERS = re.compile(r"laion|open_?clip|datacomp|siglip|eva|dfn|metaclip|dino|intern", re.IGNORECASE)

# Stored names that are never weights of ours, by the end of the name: tables that are computed from the config.
COMPUTED = (".position_ids", ".inv_freq")
# The other half of a whole CLIP: its text tower and the heads that compare the two.
CLIP_TEXT_HALF = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")

# What wraps a model in training and then stands in its names: data parallel, torch.compile, FSDP, Fabric, PEFT.
WRAPPERS = {"module", "_module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
PEFT_PREFIX = "base_model.model."
# How names begin that no wrapper stands in front of ...
STARTS = {prefix.partition(".")[0] for prefix in (*PREFIXES, *CLIP_PREFIXES, *CLIP_TEXT_HALF, PEFT_PREFIX)} - {""}
STARTS |= {"embeddings", "encoder", "pre_layrnorm", "post_layernorm"}  # the vision half of a CLIP alone
# ... but for a model that another one holds as its `model`.
TWO_MODELS = ("model.model.", "model.lm_head.", "model.language_model.model.", "model.language_model.lm_head.")

# What comes beside a language model: a projector trained alone, and what a LoRA run trained besides its adapter.
PROJECTOR_NAME, REST_NAME = "mm_projector.bin", "non_lora_trainables.bin"
TABLES = ("language_model.embed_tokens.weight", "language_model.lm_head.weight")


class Checkpoint:
    """The tensors of one model, in the files of one folder or of several; opened but not read.

    tensors: our name -> where it is stored. unused: stored names that this network does not need. deltas: our name ->
    what a LoRA adds. notes: sentences about what lies there and is not read.
    Raises FileNotFoundError or ValueError naming the file, what was found and what to do.
    """

    def __init__(
        self,
        folder: str | Path,
        prefixes: dict[str, str] = PREFIXES,
        dropped: tuple[str, ...] = (),
        vocabulary: int | None = None,
    ):
        self.folder = Path(folder)  # the one that messages name
        self.rows: int | None = None  # of the two tables, where an adapter enlarged them
        self.vocabulary = vocabulary  # rows that the two tables grow to, when they have fewer; None: they stay
        self.unused: list[str] = []
        self.tensors: dict[str, Stored] = {}
        self.new_rows: dict[str, Stored] = {}  # the last rows of a table: of tokens that the base does not know
        self.deltas: dict[str, Delta] = {}
        self.notes: list[str] = []
        for name, stored in self._named(self._open(), prefixes, dropped):
            if name in self.tensors:
                twin = self.tensors[name].name
                raise ValueError(f"{self.folder}: {twin} and {stored.name} are both {name}; remove one")
            self.tensors[name] = stored
        self.quantised: dict[str, dict[str, Stored]] = {}  # our name -> the parts of quantize.py, by their suffixes
        for name in [n for n in self.tensors if n.endswith(tuple(f".{suffix}" for suffix in PARTS))]:
            self._join_parts(*name.rsplit(".", 1))

    def _open(self) -> list[tuple[str, Stored]]:
        """The tensors of the folder by their names without wrappers. Raises as the class says."""
        try:
            tensors = open_folder(self.folder)
        except OtherObjects as error:
            if not (method := stated_method(self.folder)):
                raise
            raise quantised(self.folder, method, str(error).removeprefix(f"{self.folder}/")) from None
        except FileNotFoundError:
            for file in sorted(self.folder.glob("*.gguf"))[:1]:
                raise quantised(self.folder, "llama.cpp", f"holds {file.name}") from None
            raise
        for stored in tensors:
            if re.search(r"\.lora_[AB]\.", stored.name):
                found = f"holds a LoRA that was not merged ({stored.name})"
                raise ValueError(f"{stored.path}: {found}; save what PEFT's merge_and_unload() returns")
        refuse_quantised(
            self.folder, tensors, COMPUTED, tuple(f".{suffix}" for pair in PARTS.items() for suffix in pair)
        )
        read, others = weight_files(self.folder)
        others += [self.folder / name for name in (PROJECTOR_NAME, REST_NAME) if (self.folder / name).exists()]
        if others:
            self.notes.append(several_sets(read[0], others))
        return unwrapped(tensors)

    def _join_parts(self, module: str, suffix: str) -> None:
        """A quantised weight and its scales become one tensor, `<module>.weight`. Raises ValueError."""
        stored, name, other = self.tensors.pop(f"{module}.{suffix}"), f"{module}.weight", PARTS[suffix]
        scales = self.tensors.pop(f"{module}.{other}", None)
        if scales is None or name in self.tensors:
            found = f"{self.tensors[name].name} besides" if name in self.tensors else f"no {other} for it"
            raise ValueError(f"{stored.path}: holds {stored.name} and {found}; download it again")
        self.tensors[name], self.quantised[name] = stored, {suffix: stored, other: scales}
        dtype = stored.file.read(stored.name).dtype
        try:
            whole_shape({part: found.shape for part, found in self.quantised[name].items()})
            if dtype != {"weight_int8": torch.int8, "weight_int4": torch.uint8}[suffix]:
                raise ValueError(f"is {dtype}")
        except ValueError as error:
            raise ValueError(f"{stored.path}: {stored.name} {error}; download it again") from None

    def _named(
        self, tensors: Iterable[tuple[str, Stored]], prefixes: dict[str, str], dropped: tuple[str, ...] = ()
    ) -> Iterable[tuple[str, Stored]]:
        for name, stored in tensors:
            if name.endswith(COMPUTED) or name.startswith(dropped):
                self.unused.append(stored.name)
            else:
                yield _rename(name, prefixes), stored

    def lay_over(self, tensors: Iterable[tuple[str, Stored]]) -> None:
        """Tensors, by a name of any dialect, that replace those of the same name. A table of fewer rows holds those of
        new tokens, all that a training with its base frozen has to save: they become the last ones, as in LLaVA."""
        for name, stored in self._named(tensors, PREFIXES):
            before = self.tensors.get(name)
            grows = self.vocabulary is not None and name in TABLES and name not in self.quantised
            if grows and before is not None and stored.shape[0] < before.shape[0]:
                self.new_rows[name] = stored
            else:
                self.tensors[name] = stored
                self.new_rows.pop(name, None)
                self.quantised.pop(name, None)

    def adapt(self, folder: Path) -> None:
        """A LoRA from its folder: what it adds, and what was trained besides. Raises ValueError listing what does not
        fit this model."""
        adapter = Adapter(folder)
        self.notes += adapter.notes
        if (folder / REST_NAME).exists():
            self.lay_over(unwrapped(open_file(folder / REST_NAME)))
        problems, grown = [], ""
        given = [*adapter.whole, *adapter.deltas]
        plain = dict(zip(given, unwrap(given, adapter.path), strict=True))
        for name, stored in self._named([(plain[name], stored) for name, stored in adapter.whole.items()], PREFIXES):
            before = self.shape(name) if name in self.tensors else stored.shape
            if name in TABLES and stored.shape[1:] == before[1:] and stored.shape > before:
                grown = f"its run enlarged the vocabulary from {before[0]} to {stored.shape[0]}"
                self.rows = stored.shape[0]
            elif stored.shape != before:
                found, ours = list(stored.shape), list(before)
                problems.append(f"{stored.name} has shape {found}, the base model's {name} has {ours}")
            self.tensors[name] = stored
            self.quantised.pop(name, None)
            self.new_rows.pop(name, None)
        for name in TABLES:
            if grown and name in self.tensors and self.shape(name)[0] != self.rows:
                raise ValueError(f"{adapter.path}: {grown}, but it does not hold {name}; merge it with PEFT first")
        for stored_name, delta in adapter.deltas.items():
            name = _rename(plain[stored_name], PREFIXES)
            found = [delta.b.shape[0], delta.a.shape[1]]
            if name not in self.tensors:
                problems.append(f"{delta.a.name} is for {name}, which this model does not have")
            elif name in self.quantised:
                problems.append(f"{delta.a.name} is for {name}, which is quantised")
            elif name in TABLES and found[0] > self.shape(name)[0]:
                rows = f"from {self.shape(name)[0]} to {found[0]}"
                raise ValueError(f"{adapter.path}: its run enlarged the vocabulary {rows}; merge it with PEFT first")
            elif found != list(self.shape(name)):
                problems.append(f"{delta.a.name} and lora_B make {found}, {name} has shape {list(self.shape(name))}")
            elif name in self.deltas:
                problems.append(f"{delta.a.name} is a second adapter of {name}")
            self.deltas[name] = delta
        if adapter.everywhere:
            problems += [f"it holds no lora_A and lora_B for {name}" for name in self._left_out()]
        if problems:
            first = f"{adapter.path}: {problems[0]}; {len(problems)} problem(s) with {len(adapter.deltas)} layers"
            raise ValueError("\n  ".join([f"{first}: use the base model it was trained on", *problems[1:]]))

    def _left_out(self) -> list[str]:
        """Weights of the language model that a LoRA leaves alone although it changes their like in other layers."""
        layer = re.compile(r"language_model\.layers\.\d+\.")
        kinds = {layer.sub("", name) for name in self.deltas if layer.match(name)}
        return [n for n in self.tensors if layer.match(n) and layer.sub("", n) in kinds and n not in self.deltas]

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self.quantised:
            return whole_shape({suffix: stored.shape for suffix, stored in self.quantised[name].items()})
        shape = self.tensors[name].shape
        if name not in TABLES or self.vocabulary is None:
            return shape
        new = self.new_rows[name].shape[0] if name in self.new_rows else 0
        return (max(shape[0] + new, self.vocabulary), *shape[1:])

    def read(self, name: str, dtype: torch.dtype | None = None, passing: bool = False) -> Tensor:
        """The tensor at `dtype` (None: as stored), memory-mapped where it is stored so; passing: it will be made into
        another soon. Raises ValueError when it is quantised."""
        tensor = self.tensors[name].read(passing or dtype not in (None, self.stored_dtype(name)))
        dtype = tensor.dtype if dtype is None else dtype
        if self.shape(name) != tensor.shape:
            new = self.new_rows[name].read().to(tensor.dtype) if name in self.new_rows else tensor[:0]
            tensor = torch.cat([grow_rows(tensor, self.shape(name)[0] - len(new)), new])
        if name in self.deltas:
            return self.deltas[name].add_to(tensor, dtype)
        return tensor.to(dtype)

    def stored_dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].read().dtype

    def dtype(self) -> torch.dtype:
        """The dtype of the largest tensor that is not quantised, which is what people mean by the checkpoint's."""
        plain = [name for name in self.tensors if name not in self.quantised]
        return self.stored_dtype(max(plain, key=lambda name: math.prod(self.shape(name))))

    def parameters(self) -> int:
        """How many numbers the tensors hold."""
        return sum(math.prod(self.shape(name)) for name in self.tensors)

    def set_aside(self, unneeded: Callable[[str], bool]) -> None:
        """Move the tensors whose name (ours) is not needed to `unused`."""
        for name in [n for n in self.tensors if unneeded(n)]:
            self.unused.append(self.tensors.pop(name).name)


def gather(
    folder: str | Path,
    vision_tower: str | Path | None = None,
    model_base: str | Path | None = None,
    adapter: str | Path | None = None,
    vocabulary: int | None = None,
) -> Checkpoint:
    """The parts of one model from the folders that hold them; which is which is read from their files, not their names.

    folder: a whole model; or a projector (mm_projector.bin) or a LoRA (adapter_config.json), which need `model_base`,
    the language model they were trained on, whose tables grow to `vocabulary` rows. adapter: a LoRA on top of a whole
    model. vision_tower: a CLIP instead of the tower in the folder. Raises FileNotFoundError or ValueError.
    """
    folder = Path(folder)
    check_base(folder, model_base)
    part = part_of_model(folder)
    if model_base is None:
        checkpoint = Checkpoint(folder)
    else:
        checkpoint = Checkpoint(Path(model_base).expanduser(), vocabulary=vocabulary)
        checkpoint.folder = folder
    if vision_tower is not None:
        checkpoint.set_aside(lambda name: name.startswith("vision_tower."))
        clip = Checkpoint(vision_tower, CLIP_PREFIXES, dropped=CLIP_TEXT_HALF)
        checkpoint.tensors.update(clip.tensors)
        checkpoint.unused += clip.unused
        checkpoint.notes += clip.notes
    if part and (folder / PROJECTOR_NAME).exists():
        checkpoint.lay_over(unwrapped(open_file(folder / PROJECTOR_NAME)))
    if part and (folder / ADAPTER_CONFIG_NAME).exists():
        checkpoint.adapt(folder)
    elif part and (folder / REST_NAME).exists():
        raise FileNotFoundError(f"{folder}: holds {REST_NAME}, but no {ADAPTER_CONFIG_NAME}; download the adapter too")
    if adapter is not None:
        checkpoint.adapt(Path(adapter).expanduser())
    return checkpoint


def part_of_model(folder: Path) -> str | None:
    """What a folder without a language model holds of a LLaVA, in words; None for a whole model or for nothing."""
    if holds_weights(folder):
        return None
    parts = {ADAPTER_CONFIG_NAME: "a LoRA adapter", PROJECTOR_NAME: "a projector", REST_NAME: "a part of a LoRA run"}
    return next((words for name, words in parts.items() if (folder / name).exists()), None)


def check_base(folder: Path, model_base: Path | None) -> None:
    """A part needs a base, and a whole model none. Raises FileNotFoundError naming the base, or ValueError."""
    part = part_of_model(folder)
    if holds_weights(folder) and (folder / ADAPTER_CONFIG_NAME).exists():
        raise ValueError(
            f"{folder}: holds a language model and a LoRA adapter ({ADAPTER_CONFIG_NAME}); remove the adapter if it is "
            "merged already, else move it to a folder of its own and pass that with --adapter"
        )
    if part and model_base is None:
        path = folder / ADAPTER_CONFIG_NAME
        base = read_json(path).get("base_model_name_or_path") if path.exists() else None
        named = f" ({base})" if base else ""
        raise FileNotFoundError(
            f"{folder}: holds {part} and no language model; pass the folder of the one it was trained on{named} "
            "with --model-base"
        )
    if model_base is not None and not part:
        found = "a language model of its own" if holds_weights(folder) else "no weights"
        raise ValueError(f"{folder}: holds {found}, so --model-base has nothing to complete; leave it out")


def unwrapped(tensors: Sequence[Stored]) -> list[tuple[str, Stored]]:
    """Tensors by their names without wrappers (`unwrap`)."""
    return (
        list(zip(unwrap([stored.name for stored in tensors], tensors[0].path), tensors, strict=True)) if tensors else []
    )


def unwrap(names: Sequence[str], path: Path) -> list[str]:
    """Names without what training programs put around a model: `module.` and the like wherever they stand, and before
    all names one component that no dialect begins with.

    Raises ValueError naming the file where only some names begin with a wrapper: they may be of two trainings.
    """
    names, before = list(names), None
    while names != before:
        before, first = names, {name.partition(".")[0] for name in names}
        if all(name.startswith(PEFT_PREFIX) for name in names):
            names = [name.removeprefix(PEFT_PREFIX) for name in names]
        elif len(first) == 1 and not first & STARTS and all("." in name for name in names):
            names = [name.partition(".")[2] for name in names]
        elif first == {"model"} and any(name.startswith(TWO_MODELS) for name in names):
            names = [name.removeprefix("model.") for name in names]
        else:
            wrapped = [name for name in names if name.partition(".")[0] in WRAPPERS or name.startswith(PEFT_PREFIX)]
            if wrapped:
                found = f"{len(wrapped)} of {len(names)} names begin with a wrapper, such as {wrapped[0]}"
                raise ValueError(f"{path}: {found}, the others do not; save the tensors of one model, unwrapped")
            names = [".".join(part for part in name.split(".") if part not in WRAPPERS) for name in names]
    return names


def open_checkpoint(
    folder: str | Path,
    config: LlavaConfig,
    vision_tower: str | Path | None = None,
    model_base: str | Path | None = None,
    adapter: str | Path | None = None,
) -> tuple[Checkpoint, LlavaConfig]:
    """`gather`, and see that vision tower and projector are there; what the selected features do not need (the tower's
    last block, `post_layernorm`) is set aside as unused. Also returns the config as the tensors complete it (`settle`).

    Raises FileNotFoundError naming what to get when a part is missing: without values it would stay random.
    """
    checkpoint = gather(folder, vision_tower, model_base, adapter, config.text.vocab_size)
    if not any(name.startswith("vision_tower.") for name in checkpoint.tensors):
        wanted = config.vision_tower_name or CLIP_RELEASE
        raise FileNotFoundError(
            f"{folder}: holds no vision tower, as the original releases do; "
            f"download {wanted} and pass its folder with --vision-tower"
        )
    if not any(name.startswith("projector.") for name in checkpoint.tensors):
        raise FileNotFoundError(
            f"{folder}: holds no projector, without which the model cannot see; expected multi_modal_projector or "
            f"mm_projector tensors, or {PROJECTOR_NAME} or {REST_NAME} beside them; is this a language model alone?"
        )
    config = settle(config, checkpoint)

    def beyond(name: str) -> bool:
        block = re.match(r"vision_tower\.encoder\.layers\.(\d+)\.", name)
        return bool(block) and config.vision_layers_needed <= int(block[1]) < config.vision.num_hidden_layers

    checkpoint.set_aside(lambda name: name.startswith("vision_tower.post_layernorm.") or beyond(name))
    return checkpoint, config


def settle(config: LlavaConfig, checkpoint: Checkpoint) -> LlavaConfig:
    """The config as the tensors complete it. A stored head is the head, whatever `tie_word_embeddings` says; tables
    that an adapter enlarged are the vocabulary; a tower that no file describes is as large as its tensors.
    Raises ValueError for a tower whose other properties cannot be known."""
    text = config.text
    if TABLES[1] in checkpoint.tensors:
        text = replace(text, tie_word_embeddings=False)
    if checkpoint.rows is not None:
        text = replace(text, vocab_size=checkpoint.rows)
    vision = config.vision if config.vision_stated else _measure_tower(config, checkpoint)
    config = replace(config, text=text, vision=vision)
    check_config(config, checkpoint.folder / "config.json")
    return config


def _measure_tower(config: LlavaConfig, checkpoint: Checkpoint) -> VisionConfig:
    """OpenAI's CLIP of the size that the stored tensors have: its heads are 64 wide. Raises ValueError for others."""
    embeddings, first_layer = "vision_tower.embeddings.", "vision_tower.encoder.layers.0.mlp.fc1.weight"
    names = f"{embeddings}position_embedding.weight", f"{embeddings}patch_embedding.weight", first_layer
    if not all(name in checkpoint.tensors for name in names):
        return config.vision  # what is missing will be said
    positions, patches, mlp = map(checkpoint.shape, names)  # [P + 1, C], [C, 3, p, p], [F, C]
    name = config.vision_tower_name or "that lies there"
    advice = f"{checkpoint.folder}: config.json does not describe the vision tower {name}"
    step = "add the `vision_config` that it was trained with, or pass its own folder with --vision-tower"
    if OTHER_TOWERS.search(config.vision_tower_name or ""):
        raise ValueError(f"{advice}, which is not one of OpenAI's CLIPs; {step}")
    side = math.isqrt(max(positions[0] - 1, 0))
    if len(patches) != 4 or patches[2] != patches[3] or side < 1 or side * side != positions[0] - 1:
        found = f"{positions[0]} positions and patches of shape {list(patches)}"
        raise ValueError(f"{advice}, and {found} do not say how large its pictures are; {step}")
    width = patches[0]
    if width % 64 or width > 1024:
        raise ValueError(f"{advice}, and its width {width} does not say how many heads it has; {step}")
    blocks = (re.match(r"vision_tower\.encoder\.layers\.(\d+)\.", name) for name in checkpoint.tensors)
    depth = 1 + max(int(block[1]) for block in blocks if block)
    return replace(
        config.vision,
        hidden_size=width,
        intermediate_size=mlp[0],
        # The last blocks may have been left out, since no feature needs them: the index of a layer counts them.
        num_hidden_layers=max(depth, CLIP_DEPTHS.get(width, 0)),
        num_attention_heads=width // 64,
        image_size=side * patches[2],
        patch_size=patches[2],
        num_channels=patches[1],
    )


def build_model(
    config: LlavaConfig,
    checkpoint: Checkpoint,
    attend: Callable,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    quantize: str | None = None,
    tokens: int = 0,
) -> Llava:
    """The network, built without memory of its own (meta device) and filled with the checkpoint's tensors.

    At the checkpoint's own dtype on the CPU these stay memory-mapped; otherwise they are converted one by one.
    quantize: one of quantize.KINDS, for the language model's linear layers. tokens: rows its tables need at least.
    Raises ValueError listing every missing, unexpected and wrong-shaped tensor.
    """
    depth = max(config.text.num_hidden_layers, config.vision.num_hidden_layers)
    if depth > len(checkpoint.tensors) + len(checkpoint.unused):  # before anybody builds a billion layers
        found = f"num_hidden_layers is {depth}, which is more than there are tensors ({len(checkpoint.tensors)})"
        raise ValueError(f"{checkpoint.folder}: {found}; check that config.json belongs to these weights")
    with torch.device("meta"):
        model = Llava(config, attend)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _compare(checkpoint, expected)
    if tokens > config.text.vocab_size:
        with torch.device("meta"):
            model = Llava(replace(config, text=replace(config.text, vocab_size=tokens)), attend)
    if quantize and checkpoint.quantised:
        raise ValueError(f"{checkpoint.folder}: is quantised already; leave --quantize out")
    state = {}
    for name, tensor in model.state_dict().items():
        module = name.rpartition(".")[0]
        small = quantize and name.startswith("language_model.") and isinstance(model.get_submodule(module), nn.Linear)
        if name in checkpoint.quantised:
            parts = {  # int4 is packed anew
                suffix: stored.file.read(stored.name, passing=suffix == "weight_int4")
                for suffix, stored in checkpoint.quantised[name].items()
            }
            if checkpoint.shape(name) != tensor.shape:
                found, wanted = list(checkpoint.shape(name)), list(tensor.shape)
                raise ValueError(f"{checkpoint.folder}: {name} is quantised with shape {found}, expected {wanted}")
        else:
            passing = bool(small) or torch.device(device).type != "cpu"
            whole = checkpoint.read(name, None if small else dtype, passing)
            whole = (grow_rows(whole, len(tensor)) if name in TABLES else whole).to(device)
            parts = quantize_tensor(whole, quantize) if small else None
        if parts:
            layer = quantised_layer({suffix: part.to(device) for suffix, part in parts.items()})
            model.set_submodule(module, layer)
            state |= layer.state_dict(prefix=f"{module}.")
        else:
            state[name] = whole
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _compare(checkpoint: Checkpoint, expected: dict[str, tuple[int, ...]]) -> None:
    missing = [name for name in expected if name not in checkpoint.tensors]
    unexpected = [name for name in checkpoint.tensors if name not in expected]
    problems = []
    for name in sorted(set(expected) & set(checkpoint.tensors)):
        shape = checkpoint.shape(name)
        if shape != expected[name]:
            found = f"{checkpoint.tensors[name].name} has shape {list(shape)}"
            problems.append((checkpoint.tensors[name].path, f"{found}, config.json expects {list(expected[name])}"))
    near = _nearest(missing, {name: checkpoint.tensors[name].name for name in unexpected})
    problems += [(checkpoint.folder, f"{name} is missing{near[name]}") for name in missing]
    near = _nearest(unexpected, {name: name for name in expected})
    for name in unexpected:
        stored = checkpoint.tensors[name]
        problems.append((stored.path, f"{stored.name} is not part of this model{near[name]}"))
    if problems:
        path, first = problems[0]
        advice = "check that config.json belongs to these weights, or download the folder again"
        others = [problem if path == checkpoint.folder else f"{path}: {problem}" for path, problem in problems[1:]]
        raise ValueError("\n  ".join([f"{path}: {first}; {len(problems)} tensor(s) do not fit: {advice}", *others]))


def _nearest(names: list[str], known: dict[str, str]) -> dict[str, str]:
    """For each name a hint at what it may have been meant to be. known: candidate -> how to show it.

    Layers have the same names up to their numbers, so names are compared without them: a thousand wrong
    names then cost a few dozen comparisons.
    """
    numbers = re.compile(r"\d+")
    groups: dict[str, dict[tuple, str]] = {}  # name without numbers -> numbers -> how to show it
    for name, shown in known.items():
        groups.setdefault(numbers.sub("#", name), {})[tuple(numbers.findall(name))] = shown
    hints, closest = {}, {}
    for name in names:
        form = numbers.sub("#", name)
        if form not in closest:
            closest[form] = next(iter(get_close_matches(form, groups, n=1)), None)
        group = groups.get(closest[form])
        if group:
            shown = group.get(tuple(numbers.findall(name)), next(iter(group.values())))
        hints[name] = f" (nearest: {shown})" if group else ""
    return hints


def _rename(stored: str, prefixes: dict[str, str]) -> str:
    """Our name for a stored one; a name no prefix fits stays as it is, to be reported as unexpected."""
    if layer := PROJECTOR.match(stored):
        return f"projector.linear_{int(layer[1]) // 2 + 1}.{stored[layer.end() :]}"
    fitting = [p for p in prefixes if stored.startswith(p)]
    longest = max(fitting, key=len, default=None)
    return stored if longest is None else prefixes[longest] + stored.removeprefix(longest)

"""Families of vision-language models: location of the tower, and mapping from patches to visual tokens."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import nn
from transformers.vision_utils import get_vision_window_index

from ...schedule_trips import LayerSelection
from ..host import Host
from ..layers import SelectionPass, library_name, lookup
from .tower import CURRENT_PASS, ClipTowerLayer, InternvlLayer, PackedLayer, restore_units, selecting
from .visual_tokens import ExitSelection, VisualTokens, special_token_ids


def given(inputs: Mapping, names: Iterable[str]) -> dict:
    """Return the inputs of these names that are not `None`."""
    return {name: inputs[name] for name in names if inputs.get(name) is not None}


class Family(Host):
    """
    A generative vision-language model. This class supports selection after the tower: `get_image_features` returns one
    group of visual tokens per image (or tile), and the prompt has one `image_token_id` per visual token. Subclasses
    also support selection inside the tower, where a unit of patches becomes a visual token.
    """

    guidances = ("text", "image", "random")
    passes_its_text = True
    has_class_token = False
    can_fuse = False
    has_attention = False  # a scorer after the tower may read the attention of its last layer
    # Names of the tower, and of the layers in its transformer.
    tower_name = "vision_tower"
    layers_name = "encoder.layers"
    # Numbers of tokens that the processor writes before and after the placeholders of an image (or tile).
    framing_tokens = (0, 0)
    # Number of visual tokens of an image in the language model, `None` where it depends on the image's size.
    tokens_per_image: int | None = None

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.config = self.base.config
        self.image_token_id = self.config.image_token_id
        self.video_token_id = getattr(self.config, "video_token_id", None)
        # Names of what the model's encoder of images, or of videos, takes.
        self.encoder_arguments: dict[str, list[str]] = {}
        for kind in ("image", "video"):
            encode = getattr(self.base, f"get_{kind}_features", None)
            names = [] if encode is None else inspect.signature(encode).parameters
            self.encoder_arguments[kind] = [name for name in names if name != "kwargs"]

    @cached_property
    def special_token_ids(self) -> list[int]:
        return special_token_ids(self.config)

    @property
    def tower(self) -> nn.Module:
        return getattr(self.base, self.tower_name)

    @property
    def transformer(self) -> nn.Module:
        """Module that holds the tower's embeddings and layers."""
        return getattr(self.tower, "vision_model", self.tower)

    @property
    def layers(self) -> nn.ModuleList:
        return self.transformer.get_submodule(self.layers_name)

    @property
    def heads(self) -> tuple[int, int]:
        """Number and width of the tower's attention heads."""
        config = self.config.vision_config
        return config.num_attention_heads, config.hidden_size // config.num_attention_heads

    def add_hooks(self) -> list:
        """Add hooks that restore kept patches to their places, and return the handles."""
        return [self.tower.register_forward_hook(partial(restore_output, self.unit))]

    def begin_pass(self, inputs: Mapping) -> SelectionPass:
        return SelectionPass()

    def encode(self, inputs: Mapping, current: SelectionPass | None) -> VisualTokens:
        """Encode the images. Return the visual tokens that the tower keeps in this pass; `None`: all."""
        with selecting(current), self.watching_attention(current):
            tokens = self.encode_whole(inputs, current)
        if current is None:
            return tokens
        if current.attention is not None:
            attention = []
            for row, size in zip(current.attention, tokens.sizes):
                num_others = size - len(row)  # LLaVA may pass the tower's [CLS] to the language model
                attention.append(nn.functional.pad(row, (num_others, 0)))
            tokens = replace(tokens, attention=attention)
        if not current.records:
            return tokens
        positions = self.kept_tokens(tokens.sizes, inputs, current)
        return tokens.keep(positions)

    def encode_whole(self, inputs: Mapping, current: SelectionPass | None) -> VisualTokens:
        """Run the model's own encoder. Return the tokens of whole images, in which those without a patch are zeros."""
        arguments = given(inputs, self.encoder_arguments["image"])
        if current is not None and current.segments is not None:  # computed once for the tower
            arguments["image_window_index"] = current.unit_order
            arguments["image_cu_window_seqlens"] = current.segments
        output = self.base.get_image_features(**arguments, return_dict=True)
        return VisualTokens.whole(self.groups(output), output)

    def encode_videos(self, inputs: Mapping) -> tuple[VisualTokens, list[int]]:
        """
        Encode the videos. Return the visual tokens of each time step, and the number of steps of each video: 1 where
        steps have no grid.
        """
        arguments = given(inputs, self.encoder_arguments["video"])
        with selecting(None):
            output = self.base.get_video_features(**arguments, return_dict=True)
        num_steps = [1] * len(output.pooler_output)
        if inputs.get("video_grid_thw") is not None:
            num_steps = inputs["video_grid_thw"][:, 0].tolist()
        steps = []
        for video, number in zip(output.pooler_output, num_steps, strict=True):
            steps += video.chunk(number)
        return VisualTokens.whole(steps, output), num_steps

    def check_exit(self, at_exit: ExitSelection, in_tower: bool = False):
        """Raise a TypeError or a ValueError if the selection after the tower does not fit the model."""
        at_exit.check_fits(self.tokens_per_image, in_tower=in_tower)
        if at_exit.reads_attention and not self.has_attention:
            raise TypeError(f"Scorers of {type(self.model).__name__} have no `attention`, got {at_exit.scorer!r}.")

    @contextmanager
    def watching_attention(self, current: SelectionPass | None) -> Iterator[None]:
        """Set the attention of the pass, if it is wanted: one row per image, not the map."""
        if current is None or not current.wants_attention:
            yield
            return
        number = self.num_selectable_layers
        module = self.layers[number - 1]
        own_module = getattr(module, "wrapped_module", module)
        by_image = LayerSelection(guidance="image", keep_rate=1.0)
        layer = self.wrap(own_module, number, by_image)
        norm = getattr(own_module, layer.norms[0])  # engines call compiled layers past their hooks

        def watch(module: nn.Module, args: tuple):
            if CURRENT_PASS.get() is current:  # not the pass of another thread
                handle.remove()  # the scores need the norm, too
                with torch.no_grad():
                    current.attention = layer.attention_to_units(current, *args)

        handle = norm.register_forward_pre_hook(watch)
        try:
            yield
        finally:
            handle.remove()

    def groups(self, output) -> Sequence[torch.Tensor]:
        """Return the groups of visual tokens in the encoder's output."""
        return output.pooler_output

    def encoder_output(self, tokens: VisualTokens):
        """Return the encoder's output with the features of the kept tokens, as the model's forward pass takes it."""
        kept = {"pooler_output": self.pooler_output(tokens)}
        if tokens.output.get("deepstack_features") is not None:
            kept["deepstack_features"] = [
                [group[positions] for group, positions in zip(groups, tokens.positions)]
                for groups in tokens.output.deepstack_features
            ]
        return type(tokens.output)(**{**tokens.output, **kept})

    def pooler_output(self, tokens: VisualTokens) -> torch.Tensor | list[torch.Tensor]:
        """Return the features of the kept tokens in the form that the encoder has."""
        if isinstance(tokens.output.pooler_output, torch.Tensor):
            return torch.stack(tokens.features)
        return tokens.features

    def group_sizes(self, inputs: Mapping, tokens_per_prompt: list[int]) -> list[int]:
        """Return the number of visual tokens of each group."""
        number = len(inputs["pixel_values"])
        return [sum(tokens_per_prompt) // number] * number

    def images_per_group(self, inputs: Mapping, sizes: list[int]) -> list[int]:
        """Return the number of images (or tiles) of the tower's batch in each group."""
        return [1] * len(sizes)

    def to_units(self, values: list[torch.Tensor], inputs: Mapping) -> list[torch.Tensor]:
        """Return values of each group's visual tokens, `(size,)`, as those of each image's units, `(num_units,)`."""
        return values

    def kept_tokens(self, sizes: list[int], inputs: Mapping, current: SelectionPass) -> list[torch.Tensor]:
        """Return ascending positions of the visual tokens of kept patches, per group."""
        kept = current.kept_before()
        num_others = sizes[0] - current.grid_size  # LLaVA may pass the tower's [CLS] to the language model
        others = torch.arange(num_others, device=kept.device)
        others = others.expand(len(kept), -1)  # (num_images, num_others)
        kept_tokens = torch.cat([others, kept + num_others], dim=1)
        return list(kept_tokens)

    def position_ids(self, inputs: Mapping) -> torch.Tensor | None:
        """Return spatial positions of shape `(3, batch_size, length)`, or `None` for consecutive positions."""
        if not hasattr(self.base, "get_rope_index"):
            return None
        types = (inputs["input_ids"] == self.image_token_id).int()
        if self.video_token_id is not None:
            types = types + 2 * (inputs["input_ids"] == self.video_token_id).int()
        arguments = given(inputs, inspect.signature(self.base.get_rope_index).parameters)
        return self.base.get_rope_index(**{"mm_token_type_ids": types, **arguments})[0]


class Llava(Family):
    """LLaVA: the connector maps each patch to one visual token, so kept patches are restored after it."""

    layer_classes = {"CLIPEncoderLayer": ClipTowerLayer, "SiglipEncoderLayer": ClipTowerLayer}
    has_attention = True

    @property
    def num_selectable_layers(self) -> int:
        # LLaVA-1.5 reads the inputs of the last layer, and vLLM does not load that layer.
        num_layers = self.config.vision_config.num_hidden_layers
        chosen = getattr(self.config, "vision_feature_layer", -1)
        if not isinstance(chosen, (list, tuple)):
            chosen = [chosen]
        return min(layer if layer >= 0 else num_layers + 1 + layer for layer in chosen)

    @property
    def has_class_token(self) -> bool:
        return hasattr(self.transformer.embeddings, "class_embedding")

    @property
    def num_class_tokens(self) -> int:
        """Number of visual tokens of an image that are no patches."""
        keeps_class_token = getattr(self.config, "vision_feature_select_strategy", "default") == "full"
        return int(keeps_class_token and self.has_class_token)

    @property
    def tokens_per_image(self) -> int | None:
        config = self.config.vision_config
        side = config.image_size // config.patch_size
        return side**2 + self.num_class_tokens

    def to_units(self, values: list[torch.Tensor], inputs: Mapping) -> list[torch.Tensor]:
        return [values_of_image[self.num_class_tokens :] for values_of_image in values]

    def add_hooks(self) -> list:
        return [self.base.multi_modal_projector.register_forward_hook(restore_projected)]


class LlavaNext(Llava):
    """LLaVA-NeXT: the tiles of an image are packed into one group without padding, with a newline per row."""

    tokens_per_image = None
    has_attention = False

    def pack(self, tiles: list[torch.Tensor], inputs: Mapping) -> list[torch.Tensor]:
        return self.base.pack_image_features(
            tiles,
            inputs["image_sizes"],
            self.config.vision_feature_select_strategy,
            image_newline=tiles[0].new_zeros(1),
        )[0]

    def tiles_per_image(self, inputs: Mapping) -> list[int]:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        side = self.config.vision_config.image_size
        pinpoints = self.config.image_grid_pinpoints
        return [image_size_to_num_patches(size, pinpoints, side) for size in inputs["image_sizes"]]

    def blank_tiles(self, inputs: Mapping, **options) -> list[torch.Tensor]:
        """Return one number per patch, for the tiles of each image."""
        config = self.config.vision_config
        side = config.image_size // config.patch_size
        num_patches = side**2
        return [torch.zeros(number, num_patches, 1, **options) for number in self.tiles_per_image(inputs)]

    def group_sizes(self, inputs: Mapping, tokens_per_prompt: list[int]) -> list[int]:
        tiles = self.blank_tiles(inputs)
        packed = self.pack(tiles, inputs)
        return [len(group) for group in packed]

    def begin_pass(self, inputs: Mapping) -> SelectionPass:
        # `pack` crops the tiles to the image and may interpolate them. The gradient of the packed tokens' sum says
        # which patches any of them depends on; the others are padding. It costs as much as packing one number per
        # patch, and follows whatever a release of Transformers does there.
        inputs = {**inputs, "image_sizes": inputs["image_sizes"].cpu()}
        with torch.inference_mode(False), torch.enable_grad():
            tiles = self.blank_tiles(inputs, requires_grad=True)
            packed = self.pack(tiles, inputs)
            total = torch.cat(packed).sum()
            gradients = torch.autograd.grad(total, tiles)
        of_patches = torch.cat(gradients).squeeze(-1)  # (num_tiles, num_patches)
        is_image = of_patches != 0
        device = inputs["pixel_values"].device
        return SelectionPass(is_image=is_image.to(device, non_blocking=True))

    def to_units(self, values: list[torch.Tensor], inputs: Mapping) -> list[torch.Tensor]:
        # A packed token is a weighted mean of patches, so each patch gets its share of the token's value.
        with torch.enable_grad():
            device = values[0].device
            tiles = self.blank_tiles(inputs, requires_grad=True, device=device)
            packed = self.pack(tiles, inputs)
            packed = torch.cat(packed)[:, 0]
        values_of_tokens = torch.cat(values)
        shares = torch.autograd.grad(packed, tiles, values_of_tokens)
        values_of_units = torch.cat(shares)[..., 0]  # (num_tiles, num_patches)
        return list(values_of_units)

    def images_per_group(self, inputs: Mapping, sizes: list[int]) -> list[int]:
        return self.tiles_per_image(inputs)

    def kept_tokens(self, sizes: list[int], inputs: Mapping, current: SelectionPass) -> list[torch.Tensor]:
        kept = current.kept_before()
        is_dropped = torch.ones(len(kept), current.grid_size, device=kept.device)
        is_dropped = is_dropped.scatter(1, kept, 0.0).unsqueeze(-1)  # (num_tiles, num_patches, 1)
        tiles = is_dropped.split(self.tiles_per_image(inputs))
        kept_tokens = []
        for group in self.pack([*tiles], inputs):
            is_kept = group[:, 0] <= 0  # not tokens interpolated from kept and dropped patches
            kept_tokens.append(is_kept.nonzero()[:, 0])
        return kept_tokens


class LlavaOnevision(LlavaNext):
    def pack(self, tiles: list[torch.Tensor], inputs: Mapping) -> list[torch.Tensor]:
        return self.base.pack_image_features(
            tiles,
            inputs["image_sizes"],
            image_newline=tiles[0].new_zeros(1),
            vision_aspect_ratio=inputs.get("vision_aspect_ratio") or self.config.vision_aspect_ratio,
        )[0]

    def tiles_per_image(self, inputs: Mapping) -> list[int]:
        tiles = super().tiles_per_image(inputs)
        if inputs.get("batch_num_images") is None:
            return tiles
        # Only images that are alone in their prompt are cut into tiles.
        is_alone = []
        for num_images in inputs["batch_num_images"].tolist():
            is_alone += [num_images == 1] * num_images
        return [number if alone else 1 for number, alone in zip(tiles, is_alone)]


class Gemma3(Family):
    layer_classes = {"SiglipEncoderLayer": ClipTowerLayer}
    framing_tokens = (2, 2)  # \n\n<start_of_image>...<end_of_image>\n\n

    @property
    def unit(self) -> int:
        return self.base.multi_modal_projector.kernel_size

    @property
    def tokens_per_image(self) -> int:
        return self.config.mm_tokens_per_image


class Smolvlm(Family):
    """SmolVLM and Idefics3: each tile of an image is a group."""

    layer_classes = {"SmolVLMEncoderLayer": ClipTowerLayer, "Idefics3EncoderLayer": ClipTowerLayer}
    layers_follow = True  # the mask of the patches
    has_attention = True
    framing_tokens = (2, 1)  # <fake_token_around_image><global-img>...<fake_token_around_image>
    tower_name = "vision_model"

    @property
    def unit(self) -> int:
        return self.config.scale_factor

    @property
    def tokens_per_image(self) -> int:
        return self.base.image_seq_len

    def add_hooks(self) -> list:
        return [self.tower.register_forward_pre_hook(set_mask, with_kwargs=True), *super().add_hooks()]

    def groups(self, output) -> Sequence[torch.Tensor]:
        # The encoder returns the tiles of a prompt as one tensor.
        return torch.cat(output.pooler_output).split(self.tokens_per_image)

    def group_sizes(self, inputs: Mapping, tokens_per_prompt: list[int]) -> list[int]:
        num_tiles = sum(number // self.tokens_per_image for number in tokens_per_prompt)
        return [self.tokens_per_image] * num_tiles


class Internvl(Family):
    layer_classes = {"InternVLVisionLayer": InternvlLayer}
    has_class_token = True
    has_attention = True
    framing_tokens = (1, 1)  # <img>...</img>
    layers_name = "encoder.layer"
    num_selectable_layers = Llava.num_selectable_layers

    @property
    def unit(self) -> int:
        return round(1 / self.config.downsample_ratio)

    @property
    def tokens_per_image(self) -> int:
        return self.tower.embeddings.patch_embeddings.num_patches // self.unit**2


class Qwen2Vl(Family):
    """
    Qwen2-VL, Qwen3.5 and GLM-4V: images of any size in one sequence, unit by unit, with rotary embeddings. The tower
    merges units.
    """

    layer_classes = dict.fromkeys(
        (
            "Qwen2VLVisionBlock",
            "Qwen3_5VisionBlock",
            "Qwen3_5MoeVisionBlock",
            "Glm4vVisionBlock",
            "Glm4vMoeVisionBlock",
        ),
        PackedLayer,
    )
    layers_follow = True  # segments and rotary embeddings
    has_attention = True
    tower_name = "visual"
    layers_name = "blocks"

    @property
    def unit(self) -> int:
        return self.tower.spatial_merge_size

    @property
    def heads(self) -> tuple[int, int]:
        attention = self.layers[0].attn
        return attention.num_heads, attention.dim // attention.num_heads

    def add_hooks(self) -> list:
        return [self.tower.merger.register_forward_hook(partial(restore_merged, len(self.layers)))]

    def begin_pass(self, inputs: Mapping) -> SelectionPass:
        return SelectionPass(num_units=self.group_sizes(inputs, []))

    def group_sizes(self, inputs: Mapping, tokens_per_prompt: list[int]) -> list[int]:
        num_patches = inputs["image_grid_thw"].prod(dim=-1)
        num_units = num_patches // self.unit**2
        return num_units.tolist()

    def kept_tokens(self, sizes: list[int], inputs: Mapping, current: SelectionPass) -> list[torch.Tensor]:
        units_of_images = current.units_by_image(current.kept_before(), current.counts_before())
        return [units.sort().values for units in units_of_images]


class Qwen25Vl(Qwen2Vl):
    layer_classes = {"Qwen2_5_VLVisionBlock": PackedLayer}

    def begin_pass(self, inputs: Mapping) -> SelectionPass:
        current = super().begin_pass(inputs)
        grids = inputs["image_grid_thw"]
        order, current.segments = get_vision_window_index(
            grids, self.unit, self.tower.window_size, self.tower.patch_size
        )
        current.unit_order = order.to(grids.device)
        return current


class Qwen3Vl(Qwen2Vl):
    layer_classes = {"Qwen3VLVisionBlock": PackedLayer, "Qwen3VLMoeVisionBlock": PackedLayer}

    def add_hooks(self) -> list:
        handles = super().add_hooks()
        for merger, index in zip(self.tower.deepstack_merger_list, self.tower.deepstack_visual_indexes):
            handles.append(merger.register_forward_hook(partial(restore_merged, index + 1)))
        return handles


# ---- Hooks, which pickle can name ----------------------------------------------------------------------------------


def restore_output(unit: int, module: nn.Module, args: tuple, output):
    """Restore the states of a tower to the whole grid."""
    current = CURRENT_PASS.get()
    if current is None or not current.records:
        return
    length = output.last_hidden_state.shape[1]
    output.last_hidden_state = restore_units(output.last_hidden_state, unit, current)
    if output.get("hidden_states") is None:
        return
    restored = []
    for states in output.hidden_states:
        if states is not None and states.shape[1] == length:
            states = restore_units(states, unit, current)
        restored.append(states)
    output.hidden_states = tuple(restored)


def restore_projected(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
    """Restore the projected patches to the whole grid."""
    current = CURRENT_PASS.get()
    if current is None or not current.records:
        return None
    return restore_units(output, 1, current)


def restore_merged(layer: int, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
    """Restore the units after the merger of this layer to their places in the packed sequence."""
    current = CURRENT_PASS.get()
    kept = current.kept_before(layer + 1) if current is not None else None
    if kept is None:
        return None
    whole = output.new_zeros(sum(current.num_units), output.shape[1])
    return whole.index_copy(0, kept, output)


def set_mask(module: nn.Module, args: tuple, kwargs: dict):
    """Note the padding patches of SmolVLM and Idefics3."""
    if (current := CURRENT_PASS.get()) is not None:
        current.is_image = kwargs["patch_attention_mask"].flatten(1)


# By the name of the model without a head.
FAMILIES: dict[str, type[Family]] = {
    "LlavaModel": Llava,
    "LlavaNextModel": LlavaNext,
    "LlavaOnevisionModel": LlavaOnevision,
    "PaliGemmaModel": Llava,
    "Gemma3Model": Gemma3,
    "SmolVLMModel": Smolvlm,
    "Idefics3Model": Smolvlm,
    "InternVLModel": Internvl,
    "Qwen2VLModel": Qwen2Vl,
    "Qwen2_5_VLModel": Qwen25Vl,
    "Qwen3VLModel": Qwen3Vl,
    "Qwen3VLMoeModel": Qwen3Vl,
    "Qwen3_5Model": Qwen2Vl,
    "Qwen3_5MoeModel": Qwen2Vl,
    "Glm4vModel": Qwen2Vl,
    "Glm46VModel": Qwen2Vl,
    "Glm4vMoeModel": Qwen2Vl,
}
Q_FORMER = "its Q-Former has a fixed number of visual tokens; its `vision_model` supports selection"
CROSS_ATTENTION = "its decoder reads the image by cross-attention, not as tokens of the prompt"
POSITIONS = "its `get_rope_index` needs more than the types of tokens and the sizes of images"
CONVOLUTIONAL = "its vision tower is convolutional"
VOCABULARY = "an image is tokens of its vocabulary"
ROBOT = "it answers with actions of a robot, not with text"
NOT_SUPPORTED = {
    "apertus1p5": VOCABULARY,
    "blip-2": Q_FORMER,
    "chameleon": VOCABULARY,
    "diffusion_gemma": "it writes blocks of text by diffusion",
    "emu3": VOCABULARY,
    "evolla": "it reads proteins, not images",
    "fast_vlm": CONVOLUTIONAL,
    "florence2": "its vision tower has convolutions and windows, and its text model is an encoder-decoder",
    "fuyu": "it has no vision tower: its language model reads the patches themselves",
    "gemma3n": CONVOLUTIONAL,
    "git": "its visual tokens have no placeholders in the prompt",
    "granite4_vision": "layers of its language model read visual tokens of different layers of the tower",
    "hunyuan_vl": "its positions are not those of time, row and column",
    "idefics": CROSS_ATTENTION,
    "inkling_mm_model": "its encoder does not say which visual tokens an image has",
    "instructblip": Q_FORMER,
    "instructblipvideo": Q_FORMER,
    "kosmos-2": "its resampler has a fixed number of visual tokens",
    "kosmos-2.5": "its resampler has a fixed number of visual tokens",
    "llama4": "it projects the visual tokens in its own forward pass, not in `get_image_features`",
    "mistral4": "it has no vision tower",
    "mllama": CROSS_ATTENTION,
    "pi0": ROBOT,
    "pi05": ROBOT,
    "pix2struct": CROSS_ATTENTION,
    "pp_formulanet": CROSS_ATTENTION,
    "t5gemma2": CROSS_ATTENTION,
    "udop": "its encoder adds the patches to the words at their place of the page",
    "vision-encoder-decoder": CROSS_ATTENTION,
    **dict.fromkeys(("minicpmv4_7", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), POSITIONS),
}


def find_family(model: nn.Module) -> Family | None:
    """
    Return the family of a vision-language model, `None` for a model without visual tokens in its prompt. Raise a
    TypeError if the model is not supported.
    """
    base = getattr(model, "base_model", None)
    model_type = getattr(getattr(base, "config", None), "model_type", None)
    if model_type in NOT_SUPPORTED:
        raise TypeError(f"Patch selection does not support {type(model).__name__}: {NOT_SUPPORTED[model_type]}.")
    family = lookup(FAMILIES, type(base))
    if family is not None:
        # LLaVA has other towers, too, such as Pixtral.
        names = {library_name(type(module)) for module in base.modules()}
        has_known_tower = not names.isdisjoint(family.layer_classes)
        return family(model) if has_known_tower else Family(model)
    if base is None or "mm_encoder_outputs" not in inspect.signature(base.forward).parameters:
        return None
    if hasattr(base, "get_rope_index"):  # some take and ignore any argument
        missing = {"mm_token_type_ids", "image_grid_thw"} - inspect.signature(base.get_rope_index).parameters.keys()
        if missing:
            raise TypeError(
                f"Patch selection does not support {type(model).__name__}: its `get_rope_index` does not take "
                f"{' and '.join(sorted(missing))}."
            )
    if getattr(base.config, "image_token_id", None) is None:
        raise TypeError(
            f"Patch selection does not support {type(model).__name__} without an `image_token_id`. Set it in the "
            "configuration, to the token of the processor's placeholders."
        )
    return Family(model)

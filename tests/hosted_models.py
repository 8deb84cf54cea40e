"""Small random hosts of transformers and others, the part that is cut in each, and batches that they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import timm
import torch
import transformers as hf
from architectures import HF
from helpers import enliven
from torch import Tensor, nn

VIT = {**HF, "num_hidden_layers": 3}
DINO = {key: value for key, value in VIT.items() if key != "intermediate_size"} | {"mlp_ratio": 2}
STAGES = {"out_features": ["stage1", "stage3"]}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}


class Hosted(NamedTuple):
    """A host, how it is made, its part, and a batch by the number of its images."""

    make: Callable[[], nn.Module]
    part: str
    batch: Callable[[int], dict[str, Tensor]]


def pixels(count: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(count, 3, 32, 32)}


def larger_pixels(count: int) -> dict[str, Tensor]:
    """Of four stages of Swin and their merged patches."""
    return {"pixel_values": torch.randn(count, 3, 64, 64)}


def with_text(count: int, patches: int = 0) -> dict[str, Tensor]:
    """Six words behind as many places for patches."""
    words = torch.randint(3, 40, (count, 6))
    return {**pixels(count), "input_ids": torch.cat([torch.full((count, patches), 49), words], dim=1)}


def naflex(count: int) -> dict[str, Tensor]:
    """Flat patches of two shapes, padded."""
    shapes = torch.tensor([[3, 4], [2, 4]]).repeat(count, 1)[:count]
    mask = (torch.arange(12) < shapes.prod(dim=1, keepdim=True)).long()
    return {"pixel_values": torch.randn(count, 12, 192), "pixel_attention_mask": mask, "spatial_shapes": shapes}


def of_one_shape(count: int) -> dict[str, Tensor]:
    """Flat patches of images of one shape, without padding."""
    shapes = torch.tensor([[3, 4]]).repeat(count, 1)
    mask = torch.ones(count, 12, dtype=torch.long)
    return {"pixel_values": torch.randn(count, 12, 192), "pixel_attention_mask": mask, "spatial_shapes": shapes}


def naflex_with_text(count: int) -> dict[str, Tensor]:
    return {**naflex(count), "input_ids": torch.randint(3, 40, (count, 6))}


def depth_anything() -> nn.Module:
    backbone = hf.Dinov2Config(**DINO, out_features=["stage1", "stage2", "stage3"], reshape_hidden_states=False)
    sizes = {"reassemble_hidden_size": 32, "fusion_hidden_size": 8, "head_hidden_size": 8, "patch_size": 8}
    sizes |= {"neck_hidden_sizes": [8, 8, 16], "reassemble_factors": [4, 2, 1]}
    return hf.DepthAnythingForDepthEstimation(hf.DepthAnythingConfig(backbone_config=backbone, **sizes))


def dpt() -> nn.Module:
    backbone = hf.Dinov2Config(**DINO | {"num_hidden_layers": 4}, out_indices=[1, 2, 3, 4], reshape_hidden_states=False)
    sizes = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 8, "patch_size": 8}
    return hf.DPTForDepthEstimation(hf.DPTConfig(backbone_config=backbone, **sizes))


def upernet(backbone: Any = None) -> nn.Module:
    backbone = backbone or hf.SwinConfig(**SWIN, out_features=["stage1", "stage2"])
    sizes = {"hidden_size": 16, "use_auxiliary_head": False, "pool_scales": [1, 2], "num_labels": 5}
    return hf.UperNetForSemanticSegmentation(hf.UperNetConfig(backbone_config=backbone, **sizes))


def mask2former() -> nn.Module:
    backbone = hf.SwinConfig(
        **SWIN | {"depths": [2, 1, 1, 1], "num_heads": [2, 4, 4, 4]},
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    sizes = {"feature_size": 32, "mask_feature_size": 16, "hidden_dim": 32, "encoder_feedforward_dim": 32}
    sizes |= {"encoder_layers": 1, "decoder_layers": 2, "dim_feedforward": 32, "num_attention_heads": 4}
    config = hf.Mask2FormerConfig(backbone_config=backbone, **sizes, num_queries=4, num_labels=5)
    return hf.Mask2FormerForUniversalSegmentation(config)


def clip() -> nn.Module:
    text = {**TEXT, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=VIT, projection_dim=16))


def siglip() -> nn.Module:
    text = {**TEXT, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1}
    return hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=VIT))


def siglip2() -> nn.Module:
    text = {**TEXT, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1}
    vision = {key: value for key, value in VIT.items() if key != "image_size"} | {"num_patches": 16}
    return hf.Siglip2Model(hf.Siglip2Config(text_config=text, vision_config=vision))


def siglip2_vision() -> nn.Module:
    return hf.Siglip2VisionModel(siglip2().config.vision_config)


def sam() -> nn.Module:
    """Windows of 3 x 3 patches on a map of 4 x 4, which are padded; the second block sees the whole map."""
    vision = {**VIT, "mlp_dim": 64, "output_channels": 16, "window_size": 3}
    vision |= {"global_attn_indexes": [1], "num_pos_feats": 8}
    prompts = {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}
    decoder = {"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    return hf.SamModel(hf.SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder))


def sam2_vision() -> nn.Module:
    """The image encoder of SAM 2: queries are pooled where a stage begins."""
    backbone = hf.Sam2HieraDetConfig(
        hidden_size=16,
        image_size=[32, 32],
        window_positional_embedding_background_size=[4, 4],
        blocks_per_stage=[1, 2, 2, 1],
        embed_dim_per_stage=[16, 32, 64, 128],
        num_attention_heads_per_stage=[1, 2, 2, 2],
        window_size_per_stage=[4, 2, 2, 2],
        global_attention_blocks=[4],
    )
    sizes = {"backbone_channel_list": [128, 64, 32, 16], "backbone_feature_sizes": [[8, 8], [4, 4], [2, 2]]}
    return hf.Sam2VisionModel(hf.Sam2VisionConfig(backbone_config=backbone, **sizes, fpn_hidden_size=16))


def pointed(count: int) -> dict[str, Tensor]:
    """A point on every image, in the middle."""
    return {**pixels(count), "input_points": torch.full((count, 1, 1, 2), 16.0)}


def llava() -> nn.Module:
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=hf.CLIPVisionConfig(**VIT), text_config=hf.LlamaConfig(**TEXT), image_token_id=49)
    )


QWEN = {"depth": 3, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}


def qwen_text() -> dict[str, Any]:
    """With numbers that are larger than every tensor, as published models have them."""
    turns = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 1e6}
    return {**TEXT, "num_key_value_heads": 2, "rope_parameters": turns, "max_position_embeddings": 131072}


def qwen2_vl() -> nn.Module:
    vision = {**QWEN, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    ids = {"image_token_id": 49, "vision_start_token_id": 48, "vision_end_token_id": 47, "video_token_id": 46}
    config = hf.Qwen2VLConfig(vision_config=vision, text_config=qwen_text(), **ids)
    return hf.Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl() -> nn.Module:
    vision = {**QWEN, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}
    vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
    ids = {"image_token_id": 49, "vision_start_token_id": 48, "vision_end_token_id": 47, "video_token_id": 46}
    config = hf.Qwen2_5_VLConfig(vision_config=vision, text_config=qwen_text(), **ids)
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl() -> nn.Module:
    vision = {**QWEN, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    ids = {"image_token_id": 49, "vision_start_token_id": 48, "vision_end_token_id": 47, "video_token_id": 46}
    config = hf.Qwen3VLConfig(vision_config=vision, text_config={**qwen_text(), "head_dim": 16}, **ids)
    return hf.Qwen3VLForConditionalGeneration(config)


def packed(count: int) -> dict[str, Tensor]:
    """Images of 4 x 8 patches, all in one sequence; every four patches are one place in the text."""
    words = torch.randint(3, 40, (count, 6))
    front, places, back = (torch.full((count, n), token) for n, token in ((1, 48), (8, 49), (1, 47)))
    ids = torch.cat([front, places, back, words], dim=1)
    grid = torch.tensor([[1, 4, 8]]).repeat(count, 1)
    kinds = (ids == 49).long()
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(count * 32, 96),
        "image_grid_thw": grid,
        "mm_token_type_ids": kinds,
    }


class Segmenter(nn.Module):
    """A host that is nobody's: timm's maps, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
        self.backbone = timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=(0, 2), **sizes)
        self.head = nn.Conv2d(64, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.cat(self.backbone(images), dim=1))


def open_clip_model(**vision: Any) -> nn.Module:
    """Both towers of open_clip; by default its own `VisionTransformer` reads the images."""
    import open_clip

    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    own = {"patch_size": 8, "width": 64, "head_width": 32, "layers": 3}
    return open_clip.CLIP(embed_dim=24, vision_cfg={"image_size": 32, **(vision or own)}, text_cfg=text)


def open_clip_trunk() -> nn.Module:
    """The same with a model of timm as its image tower."""
    timms = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"}
    return open_clip_model(image_size=160, **timms)


def captioned(count: int, side: int) -> dict[str, Tensor]:
    """Images and words, as open_clip names them."""
    return {"image": torch.randn(count, 3, side, side), "text": torch.randint(3, 60, (count, 8))}


HOSTS = {
    "Depth Anything": Hosted(depth_anything, "backbone", pixels),
    "DPT": Hosted(dpt, "backbone", pixels),
    "UperNet": Hosted(upernet, "backbone", pixels),
    "UperNet, DINOv3": Hosted(lambda: upernet(hf.DINOv3ViTConfig(**VIT, **STAGES)), "backbone", pixels),
    "Mask2Former": Hosted(mask2former, "pixel_level_module.encoder", larger_pixels),
    "CLIP": Hosted(clip, "vision_model", with_text),
    "SigLIP": Hosted(siglip, "vision_model", with_text),
    "SigLIP 2": Hosted(siglip2, "vision_model", naflex_with_text),
    "SAM": Hosted(sam, "vision_encoder", pointed),
    "LLaVA": Hosted(llava, "vision_tower", lambda count: with_text(count, 16)),
    "Qwen2-VL": Hosted(qwen2_vl, "visual", packed),
    "Qwen2.5-VL": Hosted(qwen2_5_vl, "visual", packed),
    "Qwen3-VL": Hosted(qwen3_vl, "visual", packed),
    "timm": Hosted(Segmenter, "backbone", lambda count: {"images": torch.randn(count, 3, 32, 32)}),
}

OPEN_CLIP = {  # the first tower becomes timm's by `SuperNet`, the second is cut in place
    "open_clip": Hosted(open_clip_model, "visual", lambda count: captioned(count, 32)),
    "open_clip, timm": Hosted(open_clip_trunk, "visual", lambda count: captioned(count, 160)),
}


def of_class(name: str, sizes: dict[str, Any], **more: Any) -> Callable[[], nn.Module]:
    kind = getattr(hf, name)
    return lambda: kind(kind.config_class(**sizes, **more))


CLASSES: dict[str, Hosted] = {  # models of transformers that are converted as a whole
    "ViTModel": Hosted(of_class("ViTModel", VIT), "", pixels),
    "Dinov2Backbone": Hosted(of_class("Dinov2Backbone", DINO, **STAGES), "", pixels),
    "Dinov2Model, SwiGLU": Hosted(of_class("Dinov2Model", DINO, use_swiglu_ffn=True), "", pixels),
    "Dinov2WithRegistersModel": Hosted(of_class("Dinov2WithRegistersModel", DINO), "", pixels),
    "Dinov2WithRegistersBackbone": Hosted(of_class("Dinov2WithRegistersBackbone", DINO, **STAGES), "", pixels),
    "SwinBackbone": Hosted(of_class("SwinBackbone", SWIN, out_features=["stage1", "stage2"]), "", pixels),
    "CLIPVisionModelWithProjection": Hosted(of_class("CLIPVisionModelWithProjection", VIT), "", pixels),
    "Siglip2VisionModel": Hosted(siglip2_vision, "", naflex),
    "Siglip2VisionModel, one shape": Hosted(siglip2_vision, "", of_one_shape),
    "ViTMAEModel": Hosted(
        of_class("ViTMAEModel", VIT, mask_ratio=0.5),
        "",
        lambda count: {**pixels(count), "noise": torch.rand(count, 16)},
    ),
    "BeitModel": Hosted(
        of_class("BeitModel", VIT, use_relative_position_bias=True, layer_scale_init_value=0.1), "", pixels
    ),
    "BeitForImageClassification": Hosted(
        of_class("BeitForImageClassification", VIT, use_relative_position_bias=True), "", pixels
    ),
    "DINOv3ViTModel": Hosted(of_class("DINOv3ViTModel", VIT, num_register_tokens=2), "", pixels),
    "DINOv3ViTBackbone": Hosted(of_class("DINOv3ViTBackbone", VIT, use_gated_mlp=True, **STAGES), "", pixels),
    "MLCDVisionModel": Hosted(of_class("MLCDVisionModel", VIT), "", pixels),
    "SamVisionModel": Hosted(lambda: hf.SamVisionModel(sam().config.vision_config), "", pixels),
    "Sam2VisionModel": Hosted(sam2_vision, "", pixels),
    "VitDetModel": Hosted(
        of_class(
            "VitDetModel",
            {key: value for key, value in VIT.items() if key != "intermediate_size"},
            pretrain_image_size=32,
            mlp_ratio=2,
            window_size=2,
            window_block_indices=[0, 2],
            use_relative_position_embeddings=True,
        ),
        "",
        pixels,
    ),
    "IJepaModel": Hosted(of_class("IJepaModel", VIT), "", pixels),
    "Aimv2VisionModel": Hosted(of_class("Aimv2VisionModel", VIT), "", pixels),
}


def make(hosted: Hosted) -> nn.Module:
    """A small random host in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return enliven(hosted.make()).eval()


def batches_for(hosted: Hosted, count: int = 2, images: int = 6) -> list[dict[str, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return [hosted.batch(images) for _ in range(count)]

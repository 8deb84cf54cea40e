"""Classes of transformers that `convert_part` was tested on: what is cut of them, and why not more.

tests/hosts hold it against the modules themselves; other classes with the same modules work, too.
"""

from __future__ import annotations

from stratavit.elastic.layers import RESHAPES

_BY_Q = "q and k stay uncut (relative positions, which are multiplied by q, are the same for all heads)"
_ONE_SIZE = "calibration images of one size"
_NAMES = "has other maps than q_proj, k_proj, v_proj and o_proj, or fc1 and fc2"

CUT = ("q, k, v", "yes", "")
PAIRS = ("q, k by pairs, v", "yes", "")
IN_PLACE: dict[str, tuple[str, str, str]] = {  # class -> attention, MLP, why not more
    "ViTModel": CUT,
    "Dinov2Backbone": CUT,
    "Dinov2WithRegistersModel": CUT,
    "Dinov2WithRegistersBackbone": CUT,
    "SwinBackbone": CUT,
    "CLIPVisionModelWithProjection": CUT,
    "Siglip2VisionModel": CUT,
    "ViTMAEModel": ("q, k, v", "yes", "batches must hold `noise`, which says what is masked"),
    "BeitModel": CUT,
    "BeitForImageClassification": CUT,
    "SamVisionModel": ("v", "yes", _BY_Q),
    "Sam2VisionModel": ("q, k, v", "yes", RESHAPES),
    "VitDetModel": ("v", "yes", _BY_Q),
    "IJepaModel": CUT,
    "Aimv2VisionModel": CUT,
    "DINOv3ViTModel": PAIRS,
    "DINOv3ViTBackbone": PAIRS,
    "MLCDVisionModel": PAIRS,
    "InternVLVisionModel": ("uncut", "yes", f"its attention {_NAMES}"),
    "Swinv2Model": ("uncut", "uncut", f"its attention {_NAMES}"),
}
HOSTS: dict[str, tuple[str, str, str]] = {  # class of a host -> the same of its part
    "DepthAnythingForDepthEstimation": CUT,
    "DPTForDepthEstimation": ("q, k, v", "yes", f"with a `backbone_config`; its own ViT {_NAMES}"),
    "UperNetForSemanticSegmentation": CUT,
    "Mask2FormerForUniversalSegmentation": ("q, k, v", "yes", "its backbone: `pixel_level_module.encoder`"),
    "CLIPModel": CUT,
    "SiglipModel": CUT,
    "Siglip2Model": ("q, k, v", "yes", "its patch inputs of any shape, padded (NaFlex) or not"),
    "SamModel": ("v", "yes", f"its `vision_encoder`; {_BY_Q}"),
    "LlavaForConditionalGeneration": ("q, k, v", "yes", "layers that the model does not read stay uncut"),
    "Qwen2VLForConditionalGeneration": ("q, k by pairs, v", "yes", _ONE_SIZE),
    "Qwen2_5_VLForConditionalGeneration": ("q, k by pairs, v", "yes", _ONE_SIZE),
    "Qwen3VLForConditionalGeneration": ("q, k by pairs, v", "yes", _ONE_SIZE),
}

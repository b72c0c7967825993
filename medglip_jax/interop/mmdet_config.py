"""The mmdetection config file of an exported model: its sizes, its canvas, and its prompts."""

from ml_collections import ConfigDict

from medglip_jax.model.pixels import PIXEL_MEAN, PIXEL_STD

# What mmdetection's GLIP builds whatever its config says (models/utils/vlfuse_helper.py, atss_vlfusion_head.py).
_FIXED = {
    "model.fpn.channels": 256,
    "model.bert.hidden_size": 768,
    "model.bert.num_heads": 12,
    "model.tower.fusion_dim": 2048,
    "model.tower.fusion_heads": 8,
    "model.tower.norm_groups": 16,
    "model.tower.legacy_offsets": True,
}

_TEMPLATE = '''"""{title}

mmdetection 3.3 runs it with the weights beside it:

    from mmdet.apis import DetInferencer
    detector = DetInferencer(model="FOLDER/{config_file}", weights="FOLDER/{weights_file}")
    detector("image.png", texts="{example}", custom_entities=True)

It needs mmcv with its compiled operators, and transformers 4. The folder {language} must lie beside this file.
"""


def _register():
    """Registers how images were resized in training; none of mmdetection's transforms fits all of them so."""
    cv2, np = __import__("cv2"), __import__("numpy")  # a config file that has import statements is read otherwise
    base = __import__("mmcv.transforms").transforms.BaseTransform

    class ResizeIntoCanvas(base):
        """As large as fits into the canvas, then padded on the right and below."""

        def __init__(self, size, pad_val):
            self.size, self.pad_val = size, pad_val

        def transform(self, results):
            image = results["img"]
            height, width = image.shape[:2]
            factor = min(self.size[0] / height, self.size[1] / width)
            new = tuple(min(max(round(factor * n), 1), limit) for n, limit in zip((height, width), self.size))
            if new != (height, width):
                image = cv2.resize(image, new[::-1], interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
            canvas = np.tile(np.array(self.pad_val, np.float32), (*self.size, 1))
            canvas[: new[0], : new[1]] = image
            results.update(img=canvas, img_shape=new, scale_factor=(new[1] / width, new[0] / height), keep_ratio=True)
            return results

    __import__("mmdet.registry").registry.TRANSFORMS.register_module(module=ResizeIntoCanvas, force=True)


_register()

lang_model_name = "{{{{ fileDirname }}}}/{language}"  # mmengine fills in the folder of this file
canvas = {canvas}  # height, width that the model was trained on
mean = {mean}  # blue, green, red; images are padded with it

model = dict(
    type="GLIP",
    data_preprocessor=dict(type="DetDataPreprocessor", mean=mean, std={std}, bgr_to_rgb=False),
    backbone=dict(
        type="SwinTransformer",
        embed_dims={embed_dim},
        depths={depths},
        num_heads={num_heads},
        window_size={window},
        mlp_ratio={mlp_ratio},
        qkv_bias=True,
        drop_path_rate={drop_path},
        patch_norm=True,
        out_indices=(1, 2, 3),
        with_cp=False,
        convert_weights=False,
    ),
    neck=dict(
        type="FPN",
        in_channels={in_channels},
        out_channels={channels},
        start_level=0,
        relu_before_extra_convs=True,
        add_extra_convs="on_output",
        num_outs={num_levels},
    ),
    bbox_head=dict(
        type="ATSSVLFusionHead",
        lang_model_name=lang_model_name,
        early_fuse=True,
        num_dyhead_blocks={num_blocks},
        num_classes=80,  # not used: phrases take its place
        in_channels={channels},
        feat_channels={channels},
        anchor_generator=dict(
            type="AnchorGenerator",
            ratios=[1.0],
            octave_base_scale={anchor_scale},
            scales_per_octave=1,
            strides={strides},
            center_offset=0.5,
        ),
        bbox_coder=dict(
            type="DeltaXYWHBBoxCoderForGLIP", target_means=[0.0, 0.0, 0.0, 0.0], target_stds=[0.1, 0.1, 0.2, 0.2]
        ),
        loss_cls=dict(
            type="FocalLoss", use_sigmoid=True, gamma={focal_gamma}, alpha={focal_alpha}, loss_weight={token_weight}
        ),
        loss_bbox=dict(type="GIoULoss", loss_weight={box_weight}),
        loss_centerness=dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight={centerness_weight}),
    ),
    language_model=dict(type="BertModel", name=lang_model_name, max_tokens={max_tokens}, pad_to_max=True),
    train_cfg=dict(assigner=dict(type="ATSSAssigner", topk={atss_topk}), allowed_border=-1, pos_weight=-1, debug=False),
    test_cfg=dict(
        nms_pre={pre_nms},
        min_bbox_size=0,
        score_thr={score_threshold},
        nms=dict(type="nms", iou_threshold={nms_iou}),
        max_per_img={max_detections},
    ),
)

test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="ResizeIntoCanvas", size=canvas, pad_val=mean),
    dict(
        type="PackDetInputs",
        meta_keys=(
            "img_id",
            "img_path",
            "ori_shape",
            "img_shape",
            "scale_factor",
            "text",
            "custom_entities",
            "caption_prompt",
            "tokens_positive",
        ),
    ),
]
test_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="CocoDataset", test_mode=True, pipeline=test_pipeline, return_classes=True),
)
test_evaluator = dict(type="CocoMetric", metric="bbox")
test_cfg = dict(type="TestLoop")
visualizer = dict(type="DetLocalVisualizer")
default_scope = "mmdet"
'''


def config_file(config: ConfigDict, *, config_file: str, weights_file: str, language: str) -> str:
    """Returns the text of the config file.

    Args:
        config: the recipe.
        config_file, weights_file: names that its docstring tells.
        language: folder of the BERT model and the tokenizer.

    Raises:
        ValueError: mmdetection's GLIP cannot be built with these sizes; names the fields.
    """
    fields = {name: _get(config, name) for name in _FIXED}
    wrong = [f"  config.{name} is {value}, and {_FIXED[name]} there" for name, value in fields.items()]
    wrong = [line for line, name in zip(wrong, fields, strict=True) if fields[name] != _FIXED[name]]
    if wrong:
        raise ValueError(
            "mmdetection's GLIP has sizes of its own that this model does not share (the format huggingface holds "
            "any model):\n" + "\n".join(wrong)
        )
    model, detection = config.model, config.detection
    return _TEMPLATE.format(
        title="A GLIP that medglip_jax trained.",
        config_file=config_file,
        weights_file=weights_file,
        language=language,
        example="left lung. nodule",
        canvas=tuple(config.data.canvas),
        mean=list(PIXEL_MEAN),
        std=list(PIXEL_STD),
        embed_dim=model.swin.embed_dim,
        depths=list(model.swin.depths),
        num_heads=list(model.swin.num_heads),
        window=model.swin.window,
        mlp_ratio=model.swin.mlp_ratio,
        drop_path=model.swin.drop_path,
        in_channels=[model.swin.embed_dim * 2**stage for stage in range(1, 4)],
        channels=model.fpn.channels,
        num_levels=len(detection.strides),
        num_blocks=model.tower.num_blocks,
        anchor_scale=detection.anchor_scale,
        strides=list(detection.strides),
        focal_gamma=detection.focal_gamma,
        focal_alpha=detection.focal_alpha,
        token_weight=detection.token_loss_weight,
        box_weight=detection.box_loss_weight,
        centerness_weight=detection.centerness_loss_weight,
        max_tokens=config.data.max_tokens,
        atss_topk=detection.atss_topk,
        pre_nms=detection.pre_nms,
        score_threshold=detection.score_threshold,
        nms_iou=detection.nms_iou,
        max_detections=detection.max_detections,
    )


def _get(config: ConfigDict, name: str) -> object:
    for part in name.split("."):
        config = config[part]
    return config

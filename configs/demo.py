"""A small GLIP that `make demo` trains from random weights on two CPU cores, on phantoms or on a folder of images."""

from ml_collections import ConfigDict

from configs import medglip_t


def get_config() -> ConfigDict:
    config = medglip_t.get_config()

    config.data.batch_size = 16
    config.data.eval_batch_size = 16
    config.data.canvas = (128, 128)  # small, for the CPU; phantoms are drawn in this size
    config.data.scale_range = (0.8, 1.0)
    config.data.max_tokens = 192  # all 52 phrases of the demo's phantoms need 168
    config.data.max_negatives = 60
    config.data.expression_probability = 0.0  # too short a run to learn more than names
    config.data.prefix_probability = 0.0
    config.data.parents_positive_probability = 0.0
    config.data.hard_negative_share = 0.0
    config.data.variant_probability = 0.0
    config.data.num_threads = 1
    config.data.prefetch = 32

    model = config.model  # 1.6 M parameters: the same code as the full sizes, small
    model.swin.embed_dim = 32
    model.swin.depths = (1, 1, 2, 1)
    model.swin.num_heads = (1, 2, 4, 8)
    model.swin.window = 4
    model.swin.mlp_ratio = 2
    model.swin.drop_path = 0.0
    model.fpn.channels = 64
    model.fpn.drop_block = 0.0
    model.bert.vocab_size = 1024
    model.bert.hidden_size = 64
    model.bert.num_layers = 1
    model.bert.num_heads = 2
    model.bert.intermediate_size = 128
    model.bert.max_positions = 192
    model.bert.dropout = 0.0
    model.tower.num_blocks = 1
    model.tower.fusion_dim = 128
    model.tower.fusion_heads = 2
    model.tower.fusion_dropout = 0.0
    model.tower.legacy_offsets = False  # no released weights to agree with

    config.detection.anchor_scale = 4.0  # lesions are 8 to 16 pixels on the canvas
    config.detection.pre_nms = 300  # of 341 anchors times the phrases

    config.optimizer.learning_rate = 1e-3
    config.optimizer.text_scale = 1.0  # nothing is pretrained
    config.optimizer.bias_scale = 1.0
    config.optimizer.weight_decay = 0.05
    config.optimizer.ema = 0.99

    config.schedule.steps = 700
    config.schedule.kind = "cosine"
    config.schedule.warmup_steps = 50
    config.schedule.warmup_factor = 0.01

    config.training.log_every = 10
    config.training.checkpoint_every = 350
    config.training.keep_checkpoints = 1
    return config

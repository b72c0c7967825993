"""Blood cells of BCCD from random weights, on two CPU cores."""

from ml_collections import ConfigDict

from configs import medglip_t


def get_config() -> ConfigDict:
    config = medglip_t.get_config()
    config.data.batch_size = 8
    config.data.eval_batch_size = 8
    config.data.canvas = (192, 256)
    config.data.max_boxes = 64
    config.data.max_tokens = 32
    config.data.max_negatives = 3
    config.data.num_threads = 1
    config.data.prefetch = 16

    model = config.model
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
    model.bert.max_positions = 64
    model.bert.dropout = 0.0
    model.tower.num_blocks = 1
    model.tower.fusion_dim = 128
    model.tower.fusion_heads = 2
    model.tower.fusion_dropout = 0.0
    model.tower.legacy_offsets = False

    config.detection.anchor_scale = 6.0
    config.optimizer.learning_rate = 1e-3
    config.optimizer.text_scale = 1.0
    config.optimizer.bias_scale = 1.0
    config.optimizer.weight_decay = 0.05
    config.optimizer.ema = 0.998
    config.schedule.steps = 2000
    config.schedule.kind = "cosine"
    config.schedule.warmup_steps = 100
    config.training.log_every = 20
    config.training.checkpoint_every = 500
    config.training.keep_checkpoints = 2
    return config

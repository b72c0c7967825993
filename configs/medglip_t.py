"""GLIP-T on Med-GLIP style records: the full-size recipe, and the base that the other recipes change.

Defaults are the original's (Microsoft GLIP, glip_Swin_T_O365_GoldG.yaml) unless a comment says otherwise.
Not trained here: it is a pod-scale recipe. `configs/demo.py` and `configs/bccd.py` are the ones measured on a CPU.

    python -m medglip_jax.train --config configs/medglip_t.py --workdir DIR \
        --config.data.train=RECORDS:train --config.data.eval=RECORDS:validation
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # of parameters, dropout, data order and augmentation

    config.init = ConfigDict()  # where a new run starts from; what is not named starts from random numbers
    config.init.model = ""  # a run's working directory, or a folder that `medglip export` or `medglip import` wrote
    config.init.patterns = ()  # paths (re.search) that are taken from it, ("^backbone/", "^language/"); () is all
    config.init.backbone = ""  # folder of a Hugging Face SwinModel
    config.init.language = ""  # folder of a Hugging Face BertModel; config.data.tokenizer must be the one it knows

    config.data = ConfigDict()
    config.data.train = (
        ""  # records to train on: DIR, or DIR:SPLIT where DIR holds several splits; or several, by commas
    )
    config.data.mixture_weights = ()  # (("data set", share), ...) of all data sets in them; () by their size, as GLIP
    config.data.balance_modalities = 0.0  # 0 as they come, 1 equal shares; a modality of n images has n ** (1 - this)
    config.data.balance_granularities = 0.0  # the same for images by their rarest level (lesion, organ, ...); ours
    config.data.balance_labels = 0.0  # the same for images by their rarest label, inside the groups above
    config.data.repeat_threshold = (
        0.0  # share of images under which a label's images are repeated (LVIS: 0.001); 0 never
    )
    config.data.few_shot = 0  # images of each label, at least, that are trained on (GLIP: 1, 3, 5, 10); 0 takes all
    config.data.few_shot_seed = 0  # of their choice; ours
    config.data.max_corrupt = 10  # records that may be skipped and listed before the run ends with an error (ours)
    config.data.quarantine = ""  # file that lists them; "" is WORKDIR/quarantine.jsonl
    config.data.eval = ""  # records to evaluate on; "" trains without evaluation
    config.data.batch_size = 64  # images in a global batch
    config.data.eval_batch_size = 64  # images in a global evaluation batch
    config.data.canvas = (
        800,
        1344,
    )  # height, width in pixels: every image is resized into it and padded right and below
    config.data.scale_range = (
        0.6,
        1.0,
    )  # training size relative to the canvas (480 to 800 of the original's short side)
    config.data.flip_probability = 0.5  # horizontal flips; left and right are swapped in the phrases too
    config.data.max_boxes = 128  # boxes an image; more are an error in the loader's count, never a silent loss
    config.data.max_masks = 0  # masks of boxes, and of phrases, of an image in a batch (docs/masks.md); 0 reads none
    config.data.tokenizer = ""  # folder or hub name of a fast tokenizer; "" is the bundled medical WordPiece
    # What the text of an image is: prompts (of grounding); captions (one sentence about the image); descriptions (one
    # of each of max_descriptions regions); none. Pretraining needs the one of its task: docs/pretraining.md
    config.data.text = "prompts"
    config.data.max_descriptions = 8  # regions of an image that are described, with text = descriptions; ours
    config.data.max_tokens = 256  # tokens of a prompt
    config.data.max_negatives = 85  # absent phrases sampled into a training prompt
    config.data.full_negatives_probability = 0.5  # how often all max_negatives are taken; otherwise a random number
    config.data.caption_probability = 0.5  # how often an example's own sentence is the prompt, where it has one
    config.data.expression_probability = 0.15  # how often a sentence about some boxes, or about none, is it; ours
    config.data.prefix_probability = 0.25  # how often modality and body region come first ("chest x-ray: "); ours
    config.data.parents_positive_probability = 0.25  # how often broader names mean the boxes too ("lung"); ours
    config.data.hard_negative_share = 0.25  # least share of the sampled negatives from the same body region; ours
    # Least share of the sampled negatives that are siblings of what is shown: its level, and its parent, kind or class
    config.data.sibling_negative_share = 0.0  # 0 draws as without it; ours
    config.data.level_negative_share = 0.0  # the same of its level (organ, lesion, ...), siblings among them; ours
    config.data.variant_probability = 0.15  # how often a phrase becomes another name of its label; ours
    config.data.hierarchy = ConfigDict()  # what batches say of broader names and of organs; docs/hierarchy.md
    # Relations of a box to a phrase that does not mean it, whose tokens then carry no loss where the box is: "is_a"
    # ("skin lesion" for a melanoma), "may_be", "part_of" ("lung" for a nodule); () ignores none, as GLIP
    config.data.hierarchy.ignored = ()
    config.data.hierarchy.max_pairs = 0  # most pairs of a phrase and a broader one in a prompt that are compared; ours
    config.data.hierarchy.containers = False  # boxes name the box that they lie in; ours
    config.data.num_threads = 4  # decode threads of a process
    config.data.num_workers = 0  # decode processes of a process; 0 decodes in threads
    config.data.prefetch = 16  # examples decoded ahead

    config.model = ConfigDict()
    config.model.dtype = "float32"  # compute type: float32 or bfloat16 (parameters and reductions stay float32)
    # Rematerialisation: none, blocks (nothing is kept of any block), or "PATTERN=POLICY,...": the first pattern that
    # re.search finds in a block's path (backbone/stage_0_block_1, language/layer_0, tower_3) decides. Policies: full
    # (keep nothing), dots (keep matrix products), dots_no_batch (those of layers, not of attention), none
    config.model.remat = "none"
    # Run blocks of equal shape (tower, text layers, pairs of Swin blocks) as loops, which compile a block once. Takes
    # the memory of a second copy of their parameters and gradients; on TPUs see docs/pods.md ("Planning a pod"); ours
    config.model.scan = False
    config.model.swin = ConfigDict()
    config.model.swin.embed_dim = 96  # channels of stage 1
    config.model.swin.depths = (2, 2, 6, 2)  # blocks of each stage
    config.model.swin.num_heads = (3, 6, 12, 24)  # attention heads of each stage
    config.model.swin.window = 7  # window side in tokens
    config.model.swin.mlp_ratio = 4  # hidden width of the MLP over its width
    config.model.swin.drop_path = 0.2  # stochastic depth of the last block, rising linearly from 0
    config.model.fpn = ConfigDict()
    config.model.fpn.channels = 256  # channels of every pyramid level and of the tower
    config.model.fpn.drop_block = 0.3  # training-only DropBlock on P3 and P4, block 3
    config.model.bert = ConfigDict()
    config.model.bert.vocab_size = 30522  # rows of the embedding table, at least the tokenizer's size
    config.model.bert.hidden_size = 768  # width
    config.model.bert.num_layers = 12  # layers
    config.model.bert.num_heads = 12  # attention heads
    config.model.bert.intermediate_size = 3072  # hidden width of the MLP
    config.model.bert.max_positions = 512  # rows of the position table
    config.model.bert.dropout = 0.1  # dropout in training, in the tower's text layers too
    config.model.tower = ConfigDict()
    config.model.tower.num_blocks = 6  # blocks of fusion, text layer and dynamic convolution
    config.model.tower.fusion_dim = 2048  # joint width of the image-text attention
    config.model.tower.fusion_heads = 8  # its heads
    config.model.tower.fusion_dropout = 0.1  # dropout on its attention weights
    config.model.tower.norm_groups = 16  # groups of the GroupNorm in dynamic convolutions
    config.model.tower.legacy_offsets = True  # read mismatched offset maps as released weights do (microsoft/GLIP#62)
    config.model.modality = ConfigDict()  # parts of the model that belong to a modality; see docs/modalities.md; ours
    config.model.modality.names = ""  # modalities with parts of their own, "ct,mri"; "" is a plain GLIP
    config.model.modality.embedding = False  # a learned vector is added to the image features, and one to the text's
    # Parts of the backbone that each of them has of its own, by commas: patch_embed, norms (with all biases), lora
    # (adapters on attention), stage_0 to stage_3, encoder (all of it); "" shares everything
    config.model.modality.image_parts = ""
    config.model.modality.lora_rank = 0  # inner width of these adapters; at least 1 with the part lora
    config.model.modality.lora_alpha = 16.0  # an adapter adds lora_alpha / lora_rank * A B to its kernel
    config.model.modality.group = 1  # images that share a look-up of own stages; 1 computes nothing in vain
    config.model.modality.dropout = 0.0  # share of training images that take the shared parts, whatever they show
    config.model.modality.classifier = False  # a head that tells the modality of an image whose file does not
    config.model.modality.classifier_weight = 0.1  # of its loss
    config.model.masks = ConfigDict()  # a mask branch on the fused features; see docs/masks.md
    config.model.masks.kind = ""  # "" has none; phrases (a mask a phrase), boxes (a mask a box), or both
    config.model.masks.channels = 64  # of the maps of stride 4, and of the embeddings of pixels and phrases; ours
    config.model.masks.num_convs = 2  # 3x3 convolutions on these maps; ours
    config.model.masks.norm_groups = 16  # groups of the GroupNorm after each; ours
    config.model.masks.head_channels = 8  # width of the network that a box's own parameters make (CondInst)
    config.model.masks.head_layers = 3  # its layers (CondInst)
    config.model.prior_probability = 0.01  # initial token probability, bias0 = -log((1 - p) / p)

    config.detection = ConfigDict()
    config.detection.strides = (8, 16, 32, 64, 128)  # pixels between anchors of each level
    config.detection.anchor_scale = 8.0  # anchor side over stride
    config.detection.atss_topk = 9  # candidates of a box on each level
    config.detection.focal_alpha = 0.25  # focal loss
    config.detection.focal_gamma = 2.0  # focal loss
    config.detection.token_loss_weight = 1.0  # focal loss on tokens
    config.detection.box_loss_weight = 2.0  # GIoU loss
    config.detection.centerness_loss_weight = 1.0  # centerness loss
    # Of what a phrase's score exceeds that of a broader one by; needs data.hierarchy.max_pairs. 0 is off; ours
    config.detection.score_consistency_weight = 0.0
    # Of the share of a box that leaves the box it lies in; needs data.hierarchy.containers. 0 is off; ours
    config.detection.containment_weight = 0.0
    config.detection.raise_broader = False  # a broader phrase scores at least as its kinds in the prompt do; ours
    config.detection.mask_dice_weight = 0.25  # Dice loss of masks, where the model has any; see docs/masks.md
    config.detection.mask_focal_weight = 5.0  # focal loss on their pixels, over Dice as in SAM (arXiv 2304.02643)
    config.detection.mask_anchors = 2  # anchors of a box that are taught its mask: the most central; ours
    config.detection.mask_margin = 0.1  # a found mask ends where its box, wider by this share of its sides, does; ours
    config.detection.score_threshold = 0.05  # least phrase score of a candidate, before centerness
    config.detection.pre_nms = 1000  # best (anchor, phrase) pairs kept of each level
    config.detection.nms_iou = 0.6  # overlap at which the weaker box of the same phrase goes
    config.detection.max_detections = 100  # boxes of an image and prompt

    config.pretraining = ConfigDict()  # what is learned in place of grounding; see docs/pretraining.md
    config.pretraining.task = ""  # contrastive, masked_image, region_caption; "" is grounding
    config.pretraining.embed_dim = 768  # joint width of images, or regions, and texts (SigLIP B)
    config.pretraining.text_pooling = "mean"  # of the text encoder's tokens: mean, or first
    config.pretraining.scale = 10.0  # cosine to logit, learned from here in its logarithm (SigLIP, arXiv 2303.15343)
    config.pretraining.bias = -10.0  # added to it, learned from here (SigLIP)
    config.pretraining.equal_texts = "negatives"  # pairs of an image with another's equal text: negatives (as SigLIP),
    # positives, or ignored
    config.pretraining.mask_patch = 32  # pixels, side of what is masked together (SimMIM, arXiv 2111.09886)
    config.pretraining.mask_ratio = 0.6  # share of an image's patches that is masked (SimMIM)
    config.pretraining.samples = (
        7  # samples of a region along each axis (RoIAlign, arXiv 1703.06870); their mean counts
    )
    # Text of a phrase in zero-shot classification; "{prefix}{phrase}" says the image's modality first ("CT: ").
    config.pretraining.template = "{phrase}"
    config.pretraining.probe_images = 10_000  # images of data.train, at most, that a linear probe learns from; ours
    config.pretraining.probe_decay = 1e-3  # L2 penalty of its weights over the mean loss of a label; ours
    config.pretraining.probe_steps = 200  # steps of L-BFGS; ours

    config.optimizer = ConfigDict()
    config.optimizer.kind = "adamw"  # adamw, adafactor, or sm3: what each keeps is in docs/pods.md
    config.optimizer.moment_dtype = "float32"  # of Adam's moments and Adafactor's first: float32 or bfloat16; ours
    config.optimizer.learning_rate = 1e-4  # peak, AdamW
    config.optimizer.text_scale = 0.1  # rate of the text encoder over the rate
    config.optimizer.bias_scale = (
        2.0  # rate of every parameter with 'bias' in its exported name over the rate; these do not decay
    )
    config.optimizer.weight_decay = 1e-4  # decoupled, scaled by the rate
    config.optimizer.b1 = 0.9  # AdamW, SM3; Adafactor keeps no first moment where it is 0
    config.optimizer.b2 = 0.999  # AdamW
    config.optimizer.eps = 1e-8  # AdamW, SM3
    config.optimizer.factored = ConfigDict()  # of Adafactor (arXiv 1804.04235, defaults of optax)
    config.optimizer.factored.decay_rate = 0.8  # the second moment's decay after t steps is 1 - t ** -decay_rate
    config.optimizer.factored.min_size = 128  # arrays with two dimensions of at least this are factored
    config.optimizer.factored.eps = 1e-30  # added to squared gradients
    config.optimizer.factored.clip_rms = 1.0  # root mean square of an array's update
    config.optimizer.clip_norm = 1.0  # global gradient norm
    config.optimizer.ema = 0.999  # decay of the parameter average, warmed up; 0 keeps none

    config.schedule = ConfigDict()
    config.schedule.steps = 1_000_000  # optimizer steps of the run
    config.schedule.kind = "step"  # step (times step_factor at step_points) or cosine (to 0)
    config.schedule.warmup_steps = 2000  # linear from warmup_factor of the rate
    config.schedule.warmup_factor = 0.001  # see warmup_steps
    config.schedule.step_points = (0.67, 0.89)  # fractions of the run
    config.schedule.step_factor = 0.1  # see step_points

    config.finetune = ConfigDict()  # what trains, most often from config.init.model on; see docs/finetuning.md
    config.finetune.mode = ""  # full (or ""), heads (head/*), lora (adapters), or prompt (offsets of phrases' tokens)
    config.finetune.frozen = ()  # patterns (re.search) of paths that do not train, in any mode: ("^language/",)
    config.finetune.layer_decay = 1.0  # rate of an encoder layer over that of the next one, as in BEiT; 1 is off
    config.finetune.lora_rank = 0  # inner width of the adapters; 0 has none (LoRA, arXiv 2106.09685: 4 to 64)
    config.finetune.lora_alpha = 16.0  # an adapter adds lora_alpha / lora_rank * A B to its kernel; ours
    config.finetune.lora_patterns = (  # kernels with an adapter: attention of Swin, BERT and the tower's text; fusion
        r"^backbone/\w+/attention/(qkv|proj)/kernel$",
        r"^(language/layer_\d+|tower_\d+/text)/(query|key|value|attention_output)/kernel$",
        r"^tower_\d+/fusion/\w+_proj/kernel$",
    )
    config.finetune.phrases = ""  # of mode prompt: FILE.txt of one a line, or "left lung. nodule"; "" is data.train's

    config.mesh = ConfigDict()  # devices along each axis; one axis may be -1: all remaining devices
    config.mesh.replica = 1  # batch axis between slices, whose network is slow; see docs/pods.md
    config.mesh.data = -1  # batch axis
    config.mesh.fsdp = 1  # batch axis that also splits parameters
    config.mesh.sequence = 1  # splits the rows of an image's maps; stays in a process
    config.mesh.tensor = 1  # splits heads and hidden widths; stays in a process
    config.sharding = "fsdp_tp"  # how parameters lie on the mesh: ddp, fsdp, hsdp or fsdp_tp
    # Own rules, which go before those of the preset. First pattern (re.search on the parameter's path) wins; the spec
    # names a mesh axis, a tuple of axes, or None, for each dimension: ((r"tower_\d+/dyconv/same/kernel", ("fsdp",)),)
    config.sharding_rules = ()
    # Mesh axes over which each named dimension of the activations is split (medglip_jax/parallel/activations.py).
    config.activation_rules = (
        ("batch", ("replica", "data", "fsdp")),
        ("height", ("sequence",)),  # rows of a map
        ("width", ()),
        ("pixels", ("sequence",)),  # of all pyramid levels together
        ("tokens", ()),
        ("channels", ()),  # of the residual streams
        ("heads", ("tensor",)),
        ("hidden", ("tensor",)),  # inside an MLP
    )

    config.training = ConfigDict()
    config.training.accumulation = 1  # micro-batches that a step takes its batch in, one after another; ours
    config.training.log_every = 50  # steps between metrics
    config.training.checkpoint_every = 5000  # steps between checkpoints; the last step is always saved
    config.training.keep_checkpoints = 3  # newest ones kept
    config.training.keep_every = 0  # steps; those of a multiple of it are kept for ever; 0 keeps none for that
    config.training.keep_best = 0  # evaluated ones with the highest best_metric, kept too; each evaluated step is saved
    config.training.best_metric = "AP"  # AP, AP50 or AP75 of the evaluation; of pretraining see docs/pretraining.md
    config.training.max_nonfinite = 0  # steps whose loss or gradient is not finite that are skipped; the next one ends
    config.training.watchdog_seconds = 1800.0  # a step, a batch of an evaluation, ... takes longer: the process ends
    config.training.eval_every = 0  # steps between evaluations on data.eval; 0 evaluates at the end only
    config.training.on_recompile = "error"  # when a step after the first compiles again: error, or warn
    config.training.peak_flops = 0.0  # bfloat16 FLOPs per second of a device, for the MFU; 0 is its maker's number
    config.training.wandb_project = ""  # project at Weights & Biases that metrics are sent to; "" sends nothing

    config.evaluation = ConfigDict()
    config.evaluation.use_ema = True  # evaluate, predict and export the averaged parameters, where there are any
    config.evaluation.modality_prefix = False  # evaluate and predict with prompts that begin with the modality ("CT: ")
    config.evaluation.modality = ""  # of images that predict is told nothing of; an export of one modality sets it
    config.evaluation.score_threshold = 0.3  # least score of a box that counts as false or inconsistent; ours
    config.evaluation.broader_phrases = False  # ask in a second pass for broader names too ("skin lesion"); ours
    return config

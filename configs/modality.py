"""GLIP-T that knows of modalities: cheap parts of its own for each, one text encoder, one tower.

Each of eleven modalities has a patch embedding, norms and biases and adapters of the backbone, and embeddings of image
and text; with a classifier of modalities these are 3.1 M parameters on top of GLIP-T's 231.8 M. A run starts with the
outputs of the plain GLIP it is given, and keeps the shared parts alive with a tenth of the images. docs/modalities.md
tells more. Not measured at this size.

    python -m medglip_jax.train --config configs/modality.py --workdir DIR --config.init.model=MODEL \\
        --config.data.train=RECORDS:train --config.data.eval=RECORDS:validation

`--config.finetune.mode=modality` trains nothing but what modalities have of their own.
"""

from ml_collections import ConfigDict

from configs import medglip_t


def get_config() -> ConfigDict:
    config = medglip_t.get_config()
    modality = config.model.modality
    modality.names = "xray,ct,mri,ultrasound,endoscopy,dermoscopy,fundus,histopathology,microscopy,oct,pet"
    modality.embedding = True
    modality.image_parts = "patch_embed,norms,lora"
    modality.lora_rank = 8
    modality.dropout = 0.1
    modality.classifier = True

    config.data.prefix_probability = 0.5
    config.evaluation.modality_prefix = True
    return config

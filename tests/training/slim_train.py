"""`medglip train` of the stand-in, with dropout: python -m tests.training.slim_train --config ... --workdir ..."""

import sys

from medglip_jax import pretrained, train
from tests.training.slim import Slim


def stand_in(config):
    return Slim(dropout=0.1)


if __name__ == "__main__":
    train.make_model = pretrained.make_model = stand_in
    sys.exit(train.main())

"""Med-GLIP in JAX: phrases in, boxes in medical images out.

from medglip_jax import MedGLIP

model = MedGLIP.from_pretrained("runs/demo")
prediction = model.predict("chest.png", ["left lung", "nodule"])
print(prediction.boxes, prediction.scores, prediction.phrases)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medglip_jax.predict import MedGLIP, Prediction

__all__ = ["MedGLIP", "Prediction"]


def __getattr__(name: str) -> Any:
    """Imports the public names when they are first used: `import medglip_jax` alone loads no library."""
    if name in __all__:
        from medglip_jax import predict

        return getattr(predict, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)

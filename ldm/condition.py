"""What an image of LDM shows: the options of a run beside those that all models share."""

from dataclasses import dataclass

from run.families import Condition
from unet_caching.options import option


@dataclass(frozen=True)
class ClassCondition(Condition):
    """Which class each image shows."""
    guidance: float | None = option(None, "classifier-free guidance; 1 = none, anything else doubles the batch")
    labels: str = option("balanced", "balanced (default): seed mod the number of classes; random: uniform, from the "
                                     "seed; or a list like 207,360 or 0-9, taken in turn")

    def name(self) -> tuple[list[str], list[str]]:
        return [], [] if self.guidance is None else [f"guidance{self.guidance:g}"]

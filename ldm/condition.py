"""What an image of LDM shows: the options that only this family has."""

from dataclasses import asdict, dataclass
from typing import Any

from ldm.config import Config
from run.families import Guided
from run.labels import Labels
from unet_caching.options import option


@dataclass(frozen=True)
class ClassCondition(Guided):
    """Which class each image shows."""
    labels: str = option("balanced", "balanced (default): seed mod the number of classes; random: uniform, from the "
                                     "seed; or a list like 207,360 or 0-9, used in turn")

    def check(self, config: Config) -> None:
        config.check_sizes()
        Labels.parse(self.labels, config.num_classes)

    def settings(self, config: Config) -> dict[str, Any]:
        labels = Labels.parse(self.labels, config.num_classes)
        return {"unet": asdict(config.unet), "first_stage": asdict(config.first_stage), "labels": labels.rule,
                "num_classes": config.num_classes, "first_stage_dtype": "fp32"}

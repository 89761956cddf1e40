"""Class labels that depend only on the image's seed."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from run.seeds import parse_seeds
from unet_caching.errors import UserError
from unet_caching.files.schema import fault

RULES = ("balanced", "random")


@dataclass(frozen=True)
class Labels:
    """The label of each seed.

    rule: 'balanced': seed mod num_classes, so num_classes consecutive seeds have each class once. 'random': uniform,
    from a hash of the seed. A list of labels: the label at position seed mod its length. No rule draws from the
    generator of the image's noise, so x_T of a seed does not depend on its label.
    """
    rule: str | list[int]
    num_classes: int

    @classmethod
    def parse(cls, text: str, num_classes: int) -> "Labels":
        """'balanced', 'random', or a list such as '207,360' or '0-9'.

        Raises UserError for anything else, and for a label outside 0 to num_classes - 1.
        """
        if text in RULES:
            return cls(text, num_classes)
        if not text[:1].isdigit():
            raise UserError(f"--labels must be balanced, random or a list like 207,360 or 0-9, got {text!r}")
        listed = parse_seeds(text, "labels", max(num_classes, 10_000))
        if max(listed) >= num_classes:
            raise UserError(f"label {max(listed)} is out of range: this model's labels are 0 to {num_classes - 1}")
        return cls(listed, num_classes)

    @classmethod
    def from_settings(cls, settings: dict) -> "Labels | None":
        """The labels of a run.json's settings; None if its model has no classes.

        Raises UserError for labels that are not valid.
        """
        if "labels" not in settings:
            return None
        rule, classes = settings["labels"], settings.get("num_classes", 0)
        if fault(rule, str | list[int]) or fault(classes, int) or rule == []:
            raise UserError(f"the settings of the images have labels {rule!r:.60} of {classes!r:.20} classes: expected "
                            f"{', '.join(RULES)} or a list, and a number of classes")
        return cls(rule, classes)

    def of(self, seed: int) -> int:
        """The label of a seed."""
        if isinstance(self.rule, list):
            return self.rule[seed % len(self.rule)]
        if self.rule == "balanced":
            return seed % self.num_classes
        # 64 bits of a hash: the same in every version of every library. The bias of the remainder is below 1e-16.
        return int.from_bytes(hashlib.sha256(f"label of seed {seed}".encode()).digest()[:8]) % self.num_classes

    def counts(self, seeds: Sequence[int]) -> list[int]:
        """How many images each class gets: [num_classes]."""
        counts = [0] * self.num_classes
        for seed in seeds:
            counts[self.of(seed)] += 1
        return counts

    def describe(self, seeds: Sequence[int]) -> str:
        """Describe the labels in one line, which says if balanced labels are not even."""
        counts = self.counts(seeds)
        used = [count for count in counts if count]
        line = f"labels: {self.rule if isinstance(self.rule, str) else 'listed'}, "
        if self.rule == "balanced" and min(counts) < max(counts):
            return (f"{line}but not even: {min(counts)} to {max(counts)} images of each of {self.num_classes} classes; "
                    f"take consecutive seeds, a multiple of {self.num_classes}")
        few, many = min(used), max(used)
        return f"{line}{few if few == many else f'{few} to {many}'} images of each of {len(used)} classes"


def read_names(path: Path, num_classes: int) -> list[str]:
    """Read class names from a text file, one per line in the order of the labels.

    Raises UserError if it is missing or has another number of lines.
    """
    if not path.is_file():
        raise UserError(f"no class names {path} (class_names of the config)")
    names = path.read_text(encoding="utf-8").splitlines()
    if len(names) != num_classes:
        raise UserError(f"{path} has {len(names)} class names, the model {num_classes} classes")
    return names

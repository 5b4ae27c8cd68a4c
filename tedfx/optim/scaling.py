"""Loss scaling, for float16: gradients of a scaled loss do not vanish, and a step whose gradients overflowed
is left out. Rules and constants are those of torch.amp.GradScaler."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from tedfx.errors import ConfigError


@dataclass
class LossScale:
    """`loss_scale=LossScale(...)`: after a step that overflowed the scale is multiplied by `backoff_factor`,
    after `growth_interval` good ones in a row by `growth_factor`.

    dynamic: False keeps the scale as it is; steps that overflow are left out all the same.
    """

    init_scale: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    dynamic: bool = True

    def __post_init__(self):
        if not (
            isfinite(self.init_scale)
            and self.init_scale > 0
            and self.growth_factor > 1
            and 0 < self.backoff_factor < 1
            and self.growth_interval >= 1
        ):
            raise ConfigError(
                f"{self}: needs a scale > 0, a growth > 1, a backoff between 0 and 1 and an interval of "
                "at least one step"
            )
        self.scale, self.good, self.skipped = float(self.init_scale), 0, 0

    @staticmethod
    def of(option) -> "LossScale | None":
        if option is None or isinstance(option, LossScale):
            return option
        if option == "dynamic":
            return LossScale()
        if isinstance(option, (int, float)) and not isinstance(option, bool):
            return LossScale(init_scale=float(option), dynamic=False)
        raise ConfigError(f'loss_scale={option!r}: "dynamic", a number, a tedfx.optim.LossScale or None')

    def update(self, finite: bool) -> None:
        self.good, self.skipped = (self.good + 1, self.skipped) if finite else (0, self.skipped + 1)
        if not self.dynamic:
            return
        if not finite:
            self.scale *= self.backoff_factor
        elif self.good == self.growth_interval:
            self.scale, self.good = self.scale * self.growth_factor, 0

    def state(self) -> dict[str, float | int]:
        return {"scale": self.scale, "good": self.good, "skipped": self.skipped}

    def load(self, state) -> None:
        if set(state) != {"scale", "good", "skipped"}:
            raise ConfigError(
                "a loss scale's state has scale, good and skipped, not "
                f"{', '.join(map(str, state)) or 'nothing'}"
            )
        self.scale, self.good, self.skipped = float(state["scale"]), int(state["good"]), int(state["skipped"])

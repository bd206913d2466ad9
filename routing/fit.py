"""Online least squares for costs: which constant, and how much per unit of two features, explain what things took.

    y  ≈  base + slope * x1 + second * x2        all three never negative

The normal equations are kept as exponentially weighted sums, and each observation is followed by one sweep of
coordinate descent from the estimate there is (Gauss-Seidel, clipped at the bounds). Compared with recursive least
squares this has three advantages here: the bounds cost nothing; what the observations cannot tell apart keeps the
proportion it had instead of drifting off, as a covariance matrix under forgetting does; and a start that is wrong a
thousandfold needs no tuning.

* **Scale.** The first observation scales all three numbers at once, so that they explain it.
* **Relative errors.** Costs range over six decades. An observation weighs `1 / (expected * max(expected, y))`: one that
  is as expected counts by its relative error, one of a stall counts as one voice however long the stall was, and so
  does one that is far too short.
* **Change.** When the last few observations all miss in one direction the past is forgotten faster.

Worked number: base 10, slope 0.5, an observation y = 3000 at x1 = 100 where 60 was expected. It weighs 1/(60 * 3000):
after fifty ordinary ones it moves the prediction by 2 %.
"""

from __future__ import annotations

MEMORY = 0.98
"""Weight of an observation relative to the next one: about fifty count."""
SWEEP_ALL = 16
"""So many first observations are each followed by several sweeps; later the estimate only has to keep up."""
NOISE = 0.1
"""Square of the relative error of an observation, where it is weighed against what is usual."""
TREND_MEMORY = 0.8
TREND_LIMIT = 0.5
"""Four observations in a row that miss twofold in the same direction reach it, one never does."""
CALM = 0.1
"""One observation that misses twofold passes it."""
HURRY = 1.5
_RENORMALISE = 1e12
_SMALLEST, _LARGEST = 1e-6, 1e9


class Fit:
    """The three numbers. Bounds may be narrowed at any time; the next observation applies them."""

    __slots__ = (
        "_gain",
        "_s00",
        "_s01",
        "_s02",
        "_s11",
        "_s12",
        "_s22",
        "_t0",
        "_t1",
        "_t2",
        "_trend",
        "base",
        "calm",
        "count",
        "highest_slope",
        "lowest_slope",
        "second",
        "second_limit",
        "slope",
        "spread",
        "usual_second",
    )

    def __init__(
        self,
        base: float,
        slope: float,
        second: float,
        *,
        second_limit: float = float("inf"),
        usual_second: float = 0.0,
        spread: float = 0.0,
    ) -> None:
        """`second` is never more than `second_limit` times `slope`. With a `spread` it is taken to be `usual_second`
        times `slope`, give or take the spread times `slope`, as far as observations do not tell better (a normal
        prior): for a feature that is hard to tell from the other, and matters far beyond where they were observed."""
        self.base, self.slope, self.second = base, slope, second
        self.count = 0
        self.lowest_slope, self.highest_slope = 1e-9, _LARGEST
        self.second_limit, self.usual_second, self.spread = second_limit, usual_second, spread
        self._gain = 1.0
        self._trend = 0.0
        self.calm = True
        """Read only. Whether what was observed lately was much as expected."""
        self._s00 = self._s01 = self._s02 = self._s11 = self._s12 = self._s22 = 0.0
        self._t0 = self._t1 = self._t2 = 0.0

    def expected(self, x1: float, x2: float) -> float:
        return self.base + self.slope * x1 + self.second * x2

    def learn(self, y: float, x1: float, x2: float, weight: float = 1.0) -> None:
        """`y` was observed where the features, finite and not negative, were `x1` and `x2`."""
        y = _LARGEST if y > _LARGEST else y if y > _SMALLEST else _SMALLEST  # which a NaN becomes too
        expected = self.base + self.slope * x1 + self.second * x2
        if self.count == 0:
            self.scale(y / expected)
            expected = y
        self.count += 1
        self._follow(y, expected)
        gain = self._gain = self._gain / MEMORY
        w = gain * weight / (expected * (y if y > expected else expected))
        w1, w2 = w * x1, w * x2
        self._s00 += w
        self._s01 += w1
        self._s02 += w2
        self._s11 += w1 * x1
        self._s12 += w1 * x2
        self._s22 += w2 * x2
        self._t0 += w * y
        self._t1 += w1 * y
        self._t2 += w2 * y
        self._sweep()
        if self.count < SWEEP_ALL:
            for _ in range(3):
                self._sweep()
        if gain > _RENORMALISE:
            self._renormalise()

    def scale(self, factor: float) -> None:
        self.base = min(max(self.base * factor, _SMALLEST), _LARGEST)
        self.slope = min(max(self.slope * factor, self.lowest_slope), self.highest_slope)
        self.second = min(self.second * factor, self.second_limit * self.slope)

    def forget(self, factor: float) -> None:
        """What was observed so far shall count `factor` times less."""
        self._gain *= factor
        if self._gain > _RENORMALISE:
            self._renormalise()

    def _follow(self, y: float, expected: float) -> None:
        miss = min(1.0, y / expected - 1.0) if y > expected else max(-1.0, 1.0 - expected / y)
        trend = self._trend = TREND_MEMORY * self._trend + (1.0 - TREND_MEMORY) * miss
        self.calm = -CALM < trend < CALM
        if trend > TREND_LIMIT or trend < -TREND_LIMIT:
            self._gain *= HURRY

    def _sweep(self) -> None:
        slope, second = self.slope, self.second
        base = (self._t0 - self._s01 * slope - self._s02 * second) / self._s00
        self.base = base = base if base > _SMALLEST else _SMALLEST
        if self._s11 > 0.0:
            slope = (self._t1 - self._s01 * base - self._s12 * second) / self._s11
        lowest, highest = self.lowest_slope, self.highest_slope
        self.slope = slope = lowest if slope < lowest else highest if slope > highest else slope
        if self._s22 > 0.0:
            second = (self._t2 - self._s02 * base - self._s12 * slope) / self._s22
            if self.spread:
                spread = self.spread * slope
                told = self._s22 / self._gain * spread * spread / NOISE
                second = (second * told + self.usual_second * slope) / (1.0 + told)
            limit = self.second_limit * slope
            self.second = 0.0 if second < 0.0 else limit if second > limit else second

    def _renormalise(self) -> None:
        down = 1.0 / self._gain
        for name in ("_s00", "_s01", "_s02", "_s11", "_s12", "_s22", "_t0", "_t1", "_t2"):
            setattr(self, name, getattr(self, name) * down)
        self._gain = 1.0

"""A table as a text file has it."""

import numpy as np
import pandas as pd

ROWS = 200


def awkward(rows=ROWS, seed=0):
    """Texts, dates, empty cells, booleans in every spelling, zero inflation, decimal commas, in texts."""
    draw = np.random.RandomState(seed)
    rain = np.where(draw.uniform(size=rows) < 0.4, 0, draw.gamma(2, 3, rows).round(4))
    power = np.where(draw.uniform(size=rows) < 0.2, "", draw.normal(100, 20, rows).round(3).astype(str))
    return pd.DataFrame({
        "origin": draw.choice(["USA", "Japan", "Europe", ""], rows), "rain": rain.astype(str), "power": power,
        "day": pd.date_range("2012-01-01", periods=rows).strftime("%Y/%m/%d"),
        "open": draw.choice(["True", "FALSE", "yes", "n"], rows), "doors": draw.choice(["2", "3", "5"], rows),
        "price": [f"{x:,.2f}".translate(str.maketrans(".,", ",.")) for x in draw.normal(5000, 300, rows)],
        "name": [f"car {i}" for i in range(rows)], "wheels": "4",
        "clock": (1.7e9 + draw.normal(size=rows).round(3)).astype(str),
    })  # fmt: skip


class PolarsFrame:
    """A table as polars has it: no index and no ``set_axis``."""

    def __init__(self, frame):
        self._frame, self.columns, self.shape = frame, list(frame.columns), frame.shape

    def __getitem__(self, name):
        return self._frame[name]

    def to_numpy(self):
        return self._frame.to_numpy()

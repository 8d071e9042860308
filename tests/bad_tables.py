"""Tables that are none, or not the one that was fitted."""

import numpy as np
import pandas as pd
import scipy.sparse
import torch

GOOD = np.random.RandomState(0).normal(size=(40, 3))
FRAME = pd.DataFrame(GOOD, columns=list("abc"))


def _with(value, dtype=float):
    x = GOOD.astype(dtype)
    x[3, 1] = value
    return x


ALWAYS = {
    "None": None, "text": "abc", "empty text": "", "number": 3, "NaN": float("nan"), "dict": {"a": 1},
    "object": object(), "no rows": GOOD[:0], "no columns": GOOD[:, :0], "empty list": [], "ragged": [[1, 2], [3]],
    "four axes": GOOD[None, None],
    "NaN cell": _with(np.nan), "infinite cell": _with(-np.inf), "text cell": _with("a", object),
    "None cell": _with(None, object), "beyond float64": _with(10**400, object), "list cell": _with([1], object),
    "complex": GOOD + 1j, "texts": ["a", "b"] * 20,
    "fields": np.zeros(40, dtype=[("a", float), ("b", float), ("c", float)]),
    "sparse": scipy.sparse.csr_matrix(GOOD), "masked": np.ma.masked_array(GOOD, mask=GOOD > 1),
    "frame of dates": FRAME.assign(a=pd.Timestamp("2020")), "frame with NA": FRAME.assign(a=pd.array([1, None] * 20)),
    "frame of texts": FRAME.assign(a="x"), "frame of lists": FRAME.assign(a=[[1]] * 40),
    "frame without rows": FRAME[:0],
    "sparse tensor": torch.from_numpy(GOOD).to_sparse(), "complex tensor": torch.from_numpy(GOOD).to(torch.complex64),
    "no tensor": torch.empty(40, 3, device="meta"), "no dimensions": torch.tensor(1.0),
}  # fmt: skip
"""What neither a fit nor a score takes."""

OTHERS = {
    "two columns": GOOD[:, :2], "four columns": np.c_[GOOD, GOOD[:, 0]], "three axes": GOOD[None],
    "frame of two columns": FRAME[["a", "b"]],
}  # fmt: skip
"""What no score takes after a fit of three columns."""

NUMBERS = {"text": "x", "None cell": [None], "dict": {}, "list": [], "NaN": float("nan"), "half": 1.5, "negative": -1}
"""What is no number of draws, bins or the like."""

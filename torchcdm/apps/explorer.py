"""A page in the browser on one model: its density at every level, its denoiser, what is odd and where, and samples."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial, wraps
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from torch import Tensor

from torchcdm import compose
from torchcdm.apps.anomaly import SCORES, AnomalyDetector, AnomalyMap, level_profile
from torchcdm.apps.anomaly.maps import overlay
from torchcdm.apps.plots import row_of_axes
from torchcdm.data.images import resize
from torchcdm.data.outputs import sheet
from torchcdm.errors import UserError, needed
from torchcdm.models.denoiser import working_dtype
from torchcdm.models.density import DensityModel, require_density
from torchcdm.random import stream
from torchcdm.units import TableEncoding

if TYPE_CHECKING:
    import gradio
    from matplotlib.figure import Figure

COMBINED = {"one of these": compose.any_of, "all of these at once": compose.all_of, "none of these": compose.none_of}
"""What can be made of several classes."""

BAND = (0.05, 0.5, 0.95)  # quantiles of normal data that are drawn beside an input
PICTURE = 256  # screen pixels of the side of an image


@final
@dataclass
class Explorer:
    """What the page shows, as numbers and pictures; nothing here needs a browser."""

    model: DensityModel  # of known data, conditional on classes or on nothing
    reference: Tensor  # normal data that did not train it, data units (N, *shape)
    examples: Tensor  # inputs to choose from, likewise

    def __post_init__(self) -> None:
        self.model, self.info = require_density(self.model, "the page"), self.model.info
        if self.model.context is not None:
            raise UserError("the page shows models of classes or of nothing; this one is conditional on a vector")
        self.images = len(self.info.transform.shape) == 3
        self.columns = list(self.info.columns or (f"c{k}" for k in range(self.info.transform.dim)))
        self.labels = list(self.info.class_names or ()) if self.model.classes else []

    @cached_property
    def detector(self) -> AnomalyDetector:
        """The score among normal data, ``levels`` where there are enough; fitted when it is first asked for."""
        enough = len(self.reference) // 2 >= SCORES["levels"].smallest_reference
        return AnomalyDetector("levels" if enough else "log_prob", self.model).fit(self.reference)

    @cached_property
    def map(self) -> AnomalyMap:
        """Where inputs are odd; fitted when it is first asked for."""
        return AnomalyMap(self.model).fit(self.reference)

    @cached_property
    def normal_profiles(self) -> Tensor:
        """Quantiles ``BAND`` of log p at every level among normal data, (3, T+2)."""
        return level_profile(self.model, self.reference).quantile(torch.tensor(BAND).double(), 0)

    # --- inputs ----------------------------------------------------------------------------------------------------

    def drawn(self, layers: list[np.ndarray]) -> Tensor:
        """Strokes, RGBA layers (H, W, 4), as an image of the model: white on black; data units (1, C, H, W)."""
        strokes = np.max([layer[..., 3] for layer in layers], axis=0) if layers else np.zeros((1, 1), np.uint8)
        if not strokes.any():
            raise UserError("nothing is drawn; draw with the brush first")
        transform = self.info.transform
        channels, height, width = transform.shape
        ink = resize(torch.from_numpy(strokes)[None], (height, width))
        low = self.reference.min() if transform.low is None else transform.low
        high = self.reference.max() if transform.high is None else transform.high
        return transform.quantize(low + (high - low) * ink / 255).expand(channels, -1, -1)[None].float()

    def uploaded(self, path: str) -> Tensor:
        """The first input of a file, data units (1, *shape); errors as of :meth:`ModelInfo.read_inputs`."""
        try:
            return self.info.read_inputs(path).x[:1]
        except UserError as error:
            raise UserError(str(error).replace(path, os.path.basename(path))) from None

    def row(self, cells: Any) -> Tensor:
        """A row that was typed, data units (1, d)."""
        import pandas as pd

        table = self.info.transform.table or TableEncoding.numbers(self.columns)
        first = np.asarray(cells, dtype=object).reshape(-1, len(table.names))[:1]  # the page lets one add rows
        frame = pd.DataFrame(first, columns=list(table.names))
        return TableEncoding(table.kept).encode(frame, "the row").x.float()

    # --- what is shown ---------------------------------------------------------------------------------------------

    def picture(self, x: Tensor) -> np.ndarray:
        """Images side by side in rows, enlarged: uint8 (H, W, 3)."""
        return _sheet(overlay(torch.zeros(len(x), *x.shape[2:]), x, 1.0, self.info.transform))

    def cells(self, x: Tensor) -> list[list[Any]]:
        """Rows as a table: numbers of six digits, texts and dates as they are."""
        table, numbers = self.info.transform.table, (int, float)
        rows = x.tolist() if table is None else table.decode(x)[self.columns].to_numpy(object).tolist()
        return [[float(f"{v:.6g}") if type(v) in numbers else str(v) for v in row] for row in rows]

    def levels(self, x: Tensor) -> Figure:
        """log p at every level beside that of normal data, and p(t | x), of one input."""
        profile = level_profile(self.model, x)[0].numpy()
        low, median, high = self.normal_profiles.numpy()
        least, most = float(low.min()), float(high.max())
        first, second = row_of_axes(2)
        first.fill_between(range(len(profile)), low, high, alpha=0.25, label="90 % of normal data")
        first.plot(median, linewidth=0.8)
        first.plot(profile, color="C3", label="this input")
        # The band of normal data, and at most three times its height below.
        bottom = max(float(profile.min()), least - 3 * (most - least)) - 1
        first.set(xlabel="level t", ylabel="log p_t(x), nats", ylim=(bottom, max(most, float(profile.max())) + 1))
        first.legend()
        second.plot(np.exp(profile - np.logaddexp.reduce(profile)), color="C3")
        second.set(xlabel="level t", ylabel="p(t | x)", ylim=(0, None))
        return first.figure

    def oddness(self, x: Tensor) -> tuple[str, np.ndarray | Figure]:
        """How anomalous one input is in words, and where: its map over the image, or a bar for each column."""
        score, where = self.detector.score(x), self.map(x)
        percentile, count = float(self.detector.percentile(score)[0]), len(self.detector.calibration)
        words = f"more anomalous than **{percentile:.1f} %** of {count} normal inputs (score {self.detector.name})"
        if self.images:
            return words, _sheet(overlay(where, x, self.map.limit, self.info.transform))
        order = where[0].argsort()[-20:]
        (axis,) = row_of_axes(1, max(2.0, 0.3 * len(order)))
        axis.barh([self.columns[k] for k in order], where[0][order].numpy(), color="C3")
        axis.axvline(self.map.limit, linestyle="--", linewidth=0.8)
        axis.set(xlabel="deviations beyond what is normal")
        return words, axis.figure

    def noised(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """One input at level ``t``, and E[x_0 | x_t], both data units."""
        transform, schedule, t = self.info.transform, self.model.schedule, int(t)
        z = transform(x.to(schedule.alpha.device, torch.float32))
        x_t = schedule.perturb(z, t, torch.randn(z.shape, generator=stream(0, "explorer")).to(z))
        with torch.no_grad():
            x_0 = self.model.denoise(x_t.to(working_dtype(self.model, x_t.dtype)), t).x0
        return transform.inverse(x_t).cpu().float(), transform.inverse(x_0).cpu().float()

    def samples(
        self, n: int, classes: Sequence[str] = (), how: str = "", guidance: float = 0.0, moves: int = 0,
        steps: int = 30, seed: int = 0,
    ) -> Tensor:  # fmt: skip
        """``n`` draws of the ``classes``, by name, as ``how`` says, a name in :data:`COMBINED`; of all where none is.

        ``guidance`` is for one class, ``moves`` are accepted Langevin moves after each step. Data units (n, *shape).
        """
        chosen = [self.labels.index(label) for label in classes]
        single = len(chosen) == 1 and COMBINED.get(how) is not compose.none_of
        target = self.model if single or not chosen else COMBINED.get(how, compose.any_of)(self.model, chosen)
        y, guidance = (chosen[0], guidance) if single else (None, 0.0)
        how = {"steps": int(steps), "corrector": int(moves), "guidance": guidance}
        return compose.sample(target, int(n), y=y, seed=int(seed), units="codes", **how)


def _sheet(images: Tensor) -> np.ndarray:
    """uint8 images (N, 3, H, W) in rows, enlarged: (H', W', 3)."""
    columns = int(np.ceil(np.sqrt(len(images))))
    return np.moveaxis(sheet(images, columns, 2 * PICTURE // columns), 0, 2)


# --- the page ------------------------------------------------------------------------------------------------------


def page(explorer: Explorer, title: str) -> gradio.Blocks:
    """The page, not yet served, with the ``title`` of the model; UserError where gradio is not installed."""
    gr, images = _gradio(), explorer.images
    shape, result = explorer.picture if images else explorer.cells, partial(_result, explorer)

    def told(function: Callable[..., Any]) -> Callable[..., Any]:
        """A user's mistake becomes a message in the page, which stays until it is closed."""

        @wraps(function)
        def safe(*given: Any) -> Any:
            try:
                return function(*given)
            except UserError as error:
                raise gr.Error(str(error), duration=None, print_exception=False) from None

        return safe

    def look(x: Tensor, level: int) -> tuple[Any, ...]:
        return tuple(map(shape, explorer.noised(x, level)))

    def showing(read: Callable[[Any], Tensor]) -> Callable[..., Any]:
        """What is shown of the input that ``read`` makes of what was chosen, at a level."""

        def show(chosen: Any, level: int) -> list[Any]:
            x = read(chosen)
            return [x, shape(x), *explorer.oddness(x), explorer.levels(x), *look(x, level)]

        return told(show)

    examples, last = explorer.examples, explorer.model.schedule.T
    with gr.Blocks(title=f"torchcdm: {title}", analytics_enabled=False) as blocks:
        gr.Markdown(f"# {title}\nA classification diffusion model: its density, its denoiser, and what it finds odd.")
        current = gr.State(examples[:1])
        with gr.Row():
            with gr.Column():
                with gr.Tab("Choose"):
                    number = gr.Slider(0, len(examples) - 1, 0, step=1, label="example", elem_id="example")
                with gr.Tab("Upload"):
                    file = gr.File(label="a file, as cdm score takes them; its first input counts", elem_id="upload")
                own, made, look_at = _of_ones_own(explorer)
            with gr.Column():
                words = gr.Markdown(elem_id="words")
                where = result("where it is odd", "where") if images else gr.Plot(show_label=False, elem_id="where")
        with gr.Tab("Density"):
            levels = gr.Plot(show_label=False, elem_id="levels")
        with gr.Tab("Noise"):
            level = gr.Slider(0, last, last // 2, step=1, label="noise level t", elem_id="level")
            with gr.Row():
                noisy, clean = result("with noise", "noisy"), result("denoised: E[x_0 | x_t]", "clean")
        with gr.Tab("Sample"):
            asked = _sampling_options(explorer)
            go = gr.Button("Draw samples", elem_id="sample")
            drawn = result("samples", "samples")

        shown = [current, own, words, where, levels, noisy, clean]
        chosen = showing(lambda k: examples[int(k)][None])
        gr.on([blocks.load, number.change], chosen, [number, level], shown, show_progress="minimal")
        file.upload(showing(explorer.uploaded), [file, level], shown)
        read = (lambda sketch: explorer.drawn(sketch["layers"])) if images else explorer.row
        look_at.click(showing(read), [made, level], shown)
        level.change(told(look), [current, level], [noisy, clean], show_progress="hidden")
        go.click(told(lambda *given: shape(explorer.samples(*given))), asked, drawn)
    return blocks


def _result(explorer: Explorer, label: str, name: str) -> Any:
    """A picture, or a row of cells, that the page shows."""
    gr = _gradio()
    if explorer.images:
        return gr.Image(label=label, elem_id=name, height=PICTURE + 40, interactive=False, format="png")
    return gr.Dataframe(headers=explorer.columns, label=label, elem_id=name, interactive=False)


def _of_ones_own(explorer: Explorer) -> tuple[Any, Any, Any]:
    """Where the input is shown, where one of one's own is drawn or edited, and the button that looks at it."""
    gr = _gradio()
    if explorer.images:
        with gr.Tab("Draw"):
            brush = gr.Brush(colors=["#000000"], default_size=24, color_mode="fixed")
            pad = gr.Sketchpad(brush=brush, canvas_size=(PICTURE, PICTURE), elem_id="pad", label="ink is light")
            ink = gr.Button("Look at the drawing", elem_id="ink")
        return _result(explorer, "input", "input"), pad, ink
    cells = {"row_count": 1, "column_count": len(explorer.columns), "headers": explorer.columns}
    row = gr.Dataframe(label="the row; edit its cells", elem_id="input", interactive=True, **cells)
    return row, row, gr.Button("Look at the edited row", elem_id="edited")


def _sampling_options(explorer: Explorer) -> list[Any]:
    """What :meth:`Explorer.samples` takes, in its order."""
    gr, last = _gradio(), explorer.model.schedule.T
    with gr.Row():
        count = gr.Slider(1, 64, 16, step=1, label="samples", elem_id="count")
        steps = gr.Slider(1, min(last, 200), min(last, 30), step=1, label="steps", elem_id="steps")
        seed = gr.Number(0, label="seed", precision=0, minimum=0, elem_id="seed")
    with gr.Row(visible=bool(explorer.labels)):
        classes = gr.CheckboxGroup(explorer.labels, label="classes; all where none is", elem_id="classes")
        how = gr.Radio(list(COMBINED), value="one of these", label="samples are", elem_id="how")
        guidance = gr.Slider(0, 5, 0, step=0.5, label="guidance, of one class", elem_id="guidance")
        moves = gr.Slider(0, 10, 0, step=1, label="Langevin moves a step", elem_id="moves")
    return [count, classes, how, guidance, moves, steps, seed]


def serve(blocks: gradio.Blocks, port: int = 0) -> str:
    """Serves the page on this machine alone, without any other connection, until ``blocks.close()``; its address. The
    ``port`` is of 127.0.0.1, the first free one from 7860 on when 0; UserError where it is taken."""
    theme = _gradio().themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    options = {"server_name": "127.0.0.1", "ssr_mode": False, "quiet": True, "prevent_thread_lock": True}
    try:
        return blocks.queue().launch(server_port=port or None, theme=theme, **options)[1]
    except (OSError, OverflowError, ValueError) as error:  # the last of gradio's own check of the address
        raise UserError(f"the page cannot be served at port {port} ({error}); choose another by --port") from None


def _gradio() -> Any:
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    return needed("gradio", "app", "the page")

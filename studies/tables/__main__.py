"""Writes the tables of README.md and docs/ from the result files in ``studies/results``.

    python -m studies.tables            # writes them
    python -m studies.tables --check    # exit code 1 where a page and its results differ

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; NAME is a function of :data:`TABLES`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from studies.tables import costs, energies, estimators, likelihoods, pictures, ratios, reproductions
from studies.tables.reading import ROOT

BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
REPRODUCTIONS = ("known-truth", "table1", "table2", "table3", "fig3", "fig4", "fig5", "fig6", "fig7", "fig8", "fig9")

TABLES: dict[str, Callable[[], str]] = {
    **{name: partial(reproductions.reproduction, name.replace("-", "_")) for name in REPRODUCTIONS},
    "anomaly-designs": estimators.anomaly_designs,
    "anomaly-maps": estimators.anomaly_maps,
    "anomaly-tables-auroc": partial(estimators.anomaly_tables, "auroc"),
    "anomaly-tables-precision": partial(estimators.anomaly_tables, "precision"),
    "beside-ddm": reproductions.beside_ddm,
    "beside-others": reproductions.beside_others,
    "compare-digits": partial(reproductions.compared, "compare_digits"),
    "compare-fashion": partial(reproductions.compared, "compare_fashion"),
    "composed-classes": energies.composed_classes,
    "composing": partial(energies.composing, "composing"),
    "composing-learned": partial(energies.composing, "composing_learned", "truth"),
    "conditional-density": estimators.conditional_density,
    "corrected-sampling": pictures.corrected_sampling,
    "covariate-shift": ratios.covariate_shift,
    "demo": likelihoods.demo,
    "digits-seeds": likelihoods.digits_seeds,
    "equal-time": partial(costs.equal_time, "equal_time"),
    "exam": estimators.exam,
    "exam-summary": estimators.exam_summary,
    "equal-time-gaussianized": partial(costs.equal_time, "equal_time_gaussianized"),
    "estimator-times": estimators.estimator_times,
    "estimator-waits": estimators.estimator_waits,
    "fashion": likelihoods.fashion,
    "half-precision": costs.half_precision,
    "likelihood-throughput": likelihoods.likelihood_throughput,
    "log-z": likelihoods.log_z,
    "log-z-images": partial(likelihoods.log_z_images, "fashion-mnist-conditional"),
    "log-z-images-16": partial(likelihoods.log_z_images, "fashion-mnist-16x16", by_class=False),
    "log-z-images-16-rows": partial(likelihoods.log_z_images_rows, "fashion-mnist-16x16"),
    "log-z-images-rows": partial(likelihoods.log_z_images_rows, "fashion-mnist-conditional"),
    "mixture-weights": ratios.mixture_weights,
    "mutual-information": ratios.mutual_information,
    "mutual-information-published": ratios.mutual_information_published,
    "outliers-corruptions": partial(estimators.outliers, "outliers_corruptions", "outliers"),
    "outliers-corruptions-unlabelled": partial(estimators.outliers, "outliers_corruptions_unlabelled", "outliers"),
    "outliers-held-out": partial(estimators.outliers, "outliers_held_out", "outliers"),
    "outliers-held-out-turned": partial(estimators.outliers, "outliers_held_out_turned", "outliers"),
    "outliers-tables": partial(estimators.outliers, "outliers_tables", "setting"),
    "mi-tasks": ratios.mi_tasks,
    "own-network": estimators.own_network,
    "posteriors": estimators.posteriors,
    "posteriors-10000": partial(estimators.posteriors, "posteriors_10000"),
    "posteriors-100000": partial(estimators.posteriors, "posteriors_100000"),
    "posterior-together": estimators.posterior_together,
    "posterior-rounds": estimators.posterior_rounds,
    "posterior-coverage": energies.posterior_coverage,
    "quality-curves-28": partial(pictures.quality_curves, "quality_curves28"),
    "quality-curves-started": partial(pictures.quality_curves, "quality_curves_started"),
    "quality-own": partial(pictures.own_images, "quality_own"),
    "quality-curves-groups": partial(pictures.quality_curves, "quality_curves_groups"),
    "quality-curves-clipped": partial(pictures.quality_curves, "quality_curves_clipped"),
    "quality-curves-groups-50": partial(pictures.quality_curves, "quality_curves_groups_50"),
    "quality-curves-groups-100": partial(pictures.quality_curves, "quality_curves_groups_100"),
    "quality-curves-guided": partial(pictures.quality_curves, "quality_curves_guided"),
    "quality-curves-classes": partial(pictures.quality_curves, "quality_curves_classes"),
    "quality-curves-classes-100": partial(pictures.quality_curves, "quality_curves_classes_100"),
    "quality-curves-colour": partial(pictures.quality_curves, "quality_curves_colour"),
    "quality-curves-colour-32": partial(pictures.quality_curves, "quality_curves_colour32"),
    "rare-events": energies.rare_events,
    "rare-digits": energies.rare_digits,
    "quality-of-zoo": pictures.quality_of_zoo,
    "ratio-pairs": ratios.ratio_pairs,
    "ratio-peers": ratios.ratio_peers,
    "real-shift": ratios.real_shift,
    "ruler": pictures.ruler,
    "second-order": costs.second_order,
    "step-cost-encoder": partial(costs.step_cost, "encoder"),
    "step-cost-paper": partial(costs.step_cost, "paper"),
    "step-scaling": costs.step_scaling,
    "table-density": estimators.table_density,
    "table2-seeds": reproductions.table2_seeds,
    "time-to-quality": costs.time_to_quality,
    "training-memory": costs.training_memory,
    "two-samples": ratios.two_samples,
}


def rewritten(text: str) -> str:
    """A page with its tables made anew.

    Raises:
        KeyError: A table that no function makes.
    """
    return BLOCK.sub(lambda block: block[1] + TABLES[block[2]]() + block[3], text)


def pages() -> list[Path]:
    """The pages that have tables."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path for path in found if BLOCK.search(path.read_text(encoding="utf-8"))]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a page is stale")
    options = parser.parse_args(arguments)
    stale = False
    for path in pages():
        text = path.read_text(encoding="utf-8")
        if rewritten(text) != text:
            stale = True
            print(f"{path.relative_to(ROOT)}: differs from studies/results")
            if not options.check:
                path.write_text(rewritten(text), encoding="utf-8")
    return int(options.check and stale)


if __name__ == "__main__":
    sys.exit(main())

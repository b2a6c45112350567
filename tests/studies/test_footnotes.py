"""What stands below a table."""

from attnjax.studies import PaperValue, Table
from attnjax.studies.footnotes import notes


def test_each_source_of_the_papers_figures_is_told_once():
    def figure(mixer, metric, source):
        return PaperValue({"mixer": mixer}, metric, 1.0, source)

    table = Table(
        rows=("mixer",),
        metrics=("eval/loss", "eval/accuracy"),
        paper=(
            figure("a", "eval/loss", "Table 1"),
            figure("b", "eval/loss", "Table 1"),
            figure("b", "eval/accuracy", "Table 1"),
            figure("a", "eval/accuracy", "Table 2"),
        ),
    )
    (line,) = [note for note in notes([], table, []) if "paper" in note]
    assert line == (
        "Columns marked (paper) are the paper's figures: eval/loss, eval/accuracy "
        "(Table 1); eval/accuracy (Table 2)."
    )

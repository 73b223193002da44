"""Tables that say what a noise study found."""

from clha.study.tables import markdown, study_grids


def test_the_tables_hold_every_cell() -> None:
    detection = {
        "rate": 0.4, "seed": 1, "arm": "clean", "accuracy": 0.66, "accuracy_interval": [0.6, 0.7], "auroc": 0.71,
        "auroc_interval": [0.66, 0.75], "auprc": 0.6, "auprc_interval": [0.5, 0.7], "theory_auroc": 0.72,
        "flip_rate": 0.37, "flip_rate_interval": [0.2, 0.45], "factor_at_limit": False,
    }  # fmt: skip
    gain = {"gain": 0.03, "interval": [-0.01, 0.07], "smallest_effect": 0.06}
    training = [
        {"rate": 0.4, "weights": "none", "accuracy": 0.55, "seconds": 41.2},
        {"rate": 0.4, "weights": "calibrated", "accuracy": 0.58, "gain": gain, "seconds": 40},
    ]
    none = dict.fromkeys(("auroc", "auroc_interval", "auprc", "auprc_interval"))
    more = [detection, detection | none | {"rate": 0.0, "factor_at_limit": True}]
    text = markdown(study_grids({"detection": more, "training": training}))
    assert "| 40% | 1 | clean | 0.660 [0.600, 0.700] | 0.710 [0.660, 0.750] | 0.720 |" in text
    assert "| 0% | 1 | clean | 0.660 [0.600, 0.700] | n/a | 0.720 | n/a | 0.370 [0.200, 0.450], factor at its" in text
    assert "| 40% | calibrated | 0.580 | +0.030 [-0.010, +0.070] | 0.060 | 40 |" in text


def test_detection_alone_has_no_table_of_training() -> None:
    assert [g.title for g in study_grids({"detection": [], "training": []})] == ["Finding flipped labels"]

"""Labels of runs that no sweep has labelled."""

import made_study as made

from attnjax.studies.labels import from_configs


def labels_of(*configs):
    return from_configs(configs, [f"run{i}" for i in range(len(configs))])


def test_what_differs_is_a_label_and_the_seed_is_known():
    found = labels_of(
        made.config_of("attention", 0, optim__learning_rate=0.1),
        made.config_of("attention", 3, optim__learning_rate=0.2),
    )
    assert found == [
        {"learning_rate": 0.1, "seed": 0},
        {"learning_rate": 0.2, "seed": 3},
    ]


def test_options_of_one_mechanism_are_no_labels():
    found = labels_of(
        made.config_of("attention", 0), made.config_of("gated_attention", 0)
    )
    assert [sorted(one) for one in found] == [["layers", "seed"]] * 2


def test_an_option_of_one_mechanism_is_a_label_where_it_tells_runs_apart():
    gates = [
        {"gated_attention": {"granularity": granularity}}
        for granularity in ("elementwise", "headwise")
    ]
    found = labels_of(
        made.config_of("attention", 0),
        *(made.config_of("gated_attention", 0, model__mixers=one) for one in gates),
    )
    assert [one.get("granularity") for one in found] == [
        "none",
        "elementwise",
        "headwise",
    ]


def test_where_and_how_fast_a_run_went_is_no_label():
    found = labels_of(
        made.config_of("attention", 0, train__log_every=5, mesh__fsdp=1),
        made.config_of("attention", 1, train__log_every=7, data__cache_dir="elsewhere"),
    )
    assert found == [{"layers": "attention", "seed": s} for s in (0, 1)]


def test_equal_configs_are_told_apart_by_their_folders():
    found = labels_of(*[made.config_of("attention", 0)] * 2)
    assert [one["run"] for one in found] == ["run0", "run1"]


def test_equal_last_parts_are_written_out():
    found = labels_of(
        made.config_of("attention", 0, train__batch_size=8, eval__batch_size=4),
        made.config_of("attention", 0, train__batch_size=16, eval__batch_size=2),
    )
    assert list(found[0]) == ["eval.batch_size", "train.batch_size", "seed"]

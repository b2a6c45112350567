import pytest

from attnjax.core.errors import UserError
from attnjax.studies.selection import pairs, selected

POINTS = [
    {"mixer": "softplus, LSSAR", "model": "vit", "seed": 0},
    {"mixer": "gated", "model": "vit", "seed": 0},
    {"mixer": "gated", "model": "dit", "seed": 1},
    {"judge": "yes", "seed": 0},
]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("model=vit", [0, 1]),
        ("model=vit,mixer=gated", [1]),
        ("mixer=gated,mixer=softplus, LSSAR", [0, 1, 2]),
        ("mixer=softplus, LSSAR,seed=0", [0]),
        ("seed=0", [0, 1, 3]),
        ("seed=0, judge=yes", [3]),
    ],
)
def test_labels_all_hold_and_values_of_one_are_alternatives(text, numbers):
    found = selected(text, POINTS)
    assert [i for i, chosen in enumerate(found) if chosen] == numbers


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("modl=vit", "--only: must name labels .* 'modl'. Did you mean model"),
        ("model=vti", "--only: must name values .* model=vti. Did you mean vit"),
        ("model=dit,seed=0", "No point has all of these together"),
        ("model", "must be LABEL=VALUE,...; got 'model'"),
    ],
)
def test_what_no_point_has_is_named(text, told):
    with pytest.raises(UserError, match=told):
        selected(text, POINTS)


def test_a_value_may_have_commas():
    assert pairs("a=1, 2,b=x", "--flag") == [("a", "1, 2"), ("b", "x")]

"""Communication read from a module's text."""

import pytest

from attnjax.planning import collectives, hlo

MODULE = """HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

ENTRY %main (x: f32[4,8]) -> f32[16,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %r = f32[4,8]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
  %g = (f32[4,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%r), replica_groups=[1,4]<=[4]
  ROOT %d = f32[16,8]{1,0} all-gather-done(%g)
}
"""


def test_bytes_are_those_of_the_whole_array():
    rows = collectives.collectives(hlo.parse(MODULE), 4, node=2)
    assert [(r.kind, r.group, r.nodes, r.count, r.bytes) for r in rows] == [
        ("all-gather", 4, 2, 1, 512),
        ("all-reduce", 2, 1, 1, 128),
    ]
    assert rows[0].sent == 512 * 3 / 4
    assert rows[1].sent == 2 * 128 / 2
    # Two nodes exchange halves, by two devices each.
    assert rows[0].sent_across == 512 / 2 / 2
    assert rows[1].sent_across == 0.0


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("replica_groups={{0,4},{1,5}}", [0, 4]),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}", list(range(8))),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, dimensions={0}", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", [0, 4]),
        ("replica_groups=mesh['a'=8] {'a':(4)2}", [0, 1]),
        ("source_target_pairs={{3,5},{5,3}}", [3, 5]),
        ("replica_groups={}", [0, 1, 2]),
    ],
)
def test_first_group_is_read_in_every_notation(text, ids):
    assert collectives.first_group(text, 3) == ids

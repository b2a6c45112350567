"""The page's script, run by a real engine on the least document that it needs."""

import json
import math
import shutil
import subprocess

import pytest

from attnjax.studies import cells, page

# Nodes with what the script uses, a click on each head in turn, and the rows' order.
DOCUMENT = """
class Node {
  constructor(kind, order) {
    this.classList = {contains: (one) => one === kind};
    this.dataset = {order};
    this.marks = {};
  }
  addEventListener(event, react) { this[event] = react; }
  getAttribute(name) { return this.marks[name] ?? null; }
  setAttribute(name, value) { this.marks[name] = value; }
  removeAttribute(name) { delete this.marks[name]; }
  closest(name) { return {table: theTable}[name]; }
}
const [kinds, lines] = JSON.parse(process.argv.at(-1));
const heads = kinds.map((kind) => new Node(kind));
for (const head of heads) head.parentNode = {children: heads};
const body = {
  rows: lines.map((line, name) => ({name, children: line.map((o) => new Node("", o))})),
  append(...rows) { this.rows = rows; },
};
const theTable = {tBodies: [body]};
const document = {querySelectorAll: () => heads};
"""
CLICKS = """
const seen = [];
for (const head of heads) for (let click = 0; click < 2; click++) {
  head.click();
  seen.push([body.rows.map((row) => row.name), heads.map((h) => h.marks["aria-sort"])]);
}
console.log(JSON.stringify(seen));
"""
COLUMNS = {
    "label": (["10", "9", "", "b"], [[1, 0, 3], [3, 0, 1]], 2),
    "number": ([2.0, math.inf, math.nan, -3e-7], [[3, 0, 1], [1, 0, 3]], 2),
    "hash": (["1e9 +4", "2e1", "11", None], [[0, 1, 2], [2, 1, 0]], 3),
}


def test_a_click_sorts_and_another_turns_round():
    node = shutil.which("node")
    if node is None:
        pytest.skip("node, which runs the page's script here, is not installed")
    orders = [[page._order(v) for v in column[0]] for column in COLUMNS.values()]
    lines = [list(line) for line in zip(*orders, strict=True)]
    done = subprocess.run(
        [
            node,
            "-e",
            DOCUMENT + page.SCRIPT + CLICKS,
            "",
            json.dumps([[*COLUMNS], lines]),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    for number, (_, expected, last) in enumerate(COLUMNS.values()):
        for turn, direction in enumerate(("ascending", "descending")):
            rows, marks = seen[2 * number + turn]
            assert rows == [*expected[turn], last]
            assert [mark for mark in marks if mark] == [direction]
            assert marks[number] == direction


def test_an_order_that_is_no_number_has_no_place():
    row = (cells.Text("nan", math.nan), cells.Text("<a>", "<a>"), cells.Text("1", 1))
    text = page._cells(row, ["number", "label", "number"])
    assert text.count("<td") == 3 and 'data-order=""' in text
    assert 'data-order="&lt;a&gt;">&lt;a&gt;</td>' in text and 'data-order="1"' in text

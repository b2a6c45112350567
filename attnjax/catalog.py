"""Every attention mechanism: python -m attnjax.catalog [--json] [NAME]."""

import dataclasses
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from attnjax.core import discovery, entries
from attnjax.core.cli import run_main
from attnjax.core.flags import parse_command_line, positional
from attnjax.models import options


@dataclasses.dataclass(frozen=True)
class Flags:
    """List every mechanism, or tell everything about one.

    Attributes:
        name: a mechanism of the catalog, the path of a file that defines one, or
            options of a whole model (config.model.prefix, config.model.match).
        json: print JSON.
        markdown: write the whole catalog to this Markdown file.
    """

    name: str = positional(default="")
    json: bool = False
    markdown: str = ""


COLUMNS = ("name", "family", "title", "paper", "can", "forms", "decode")


def main(argv: list[str]) -> int:
    """The front door."""
    flags = parse_command_line(
        argv, Flags, program="attnjax.catalog", config=False, overrides=False
    ).flags
    group = {group["name"]: group for group in options.groups()}.get(flags.name)
    if group is not None:
        print(json.dumps(group, indent=2) if flags.json else describe_group(group))
        return 0
    if flags.name:
        entry = entries.entry(discovery.find(flags.name, owner="catalog"))
        print(json.dumps(entry, indent=2) if flags.json else describe(entry))
        return 0
    told = entries.entries()
    if flags.markdown:
        path = Path(flags.markdown)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(markdown(told), encoding="utf-8")
        print(f"wrote {len(told)} mechanisms to {flags.markdown}")
    elif flags.json:
        print(json.dumps(told, indent=2))
    elif sys.stdout.isatty():
        _print_rich(told)
    else:
        print(plain_table([COLUMNS, *map(row, told)]))
    return 0


def row(entry: dict[str, Any]) -> tuple[str, ...]:
    """The cells of one mechanism in the table, in the order of COLUMNS."""
    return (
        entry["name"],
        entry["family"],
        entry["title"],
        entry["source"] or "textbook",
        ", ".join(entries.capability_words(entry["capabilities"])),
        ", ".join(entry["forms"]),
        decode_words(entry),
    )


def decode_words(entry: dict[str, Any]) -> str:
    """How a mechanism decodes: "exact", "differs: ...", or "none"."""
    if not entry["capabilities"]["decode"]:
        return "none"
    return entries.decode_words(entry["decode"])


def plain_table(rows: list[tuple[str, ...]]) -> str:
    """Cells in aligned columns, two spaces apart."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for cells in rows:
        padded = [f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def describe(entry: dict[str, Any]) -> str:
    """Everything about one mechanism, as plain text."""
    head = f"{entry['name']}: {entry['title']}"
    paper = ", ".join(filter(None, [entry["paper"], entry["source"]])) or "textbook"
    lines = [head, f"  paper   {paper}", f"  family  {entry['family']}"]
    lines += [
        f"  kind    {kind_words(entry)}",
        f"  forms   {', '.join(entry['forms'])}",
    ]
    can = ", ".join(entries.capability_words(entry["capabilities"]))
    lines += [f"  can     {can}", f"  decode  {decode_words(entry)}"]
    for name in ("limits", "deviations"):
        lines += ["", name] * bool(entry[name])
        for sentence in entry[name]:
            lines += _wrapped(sentence, first="  - ", rest="    ")
    lines += ["", f"options, under config.model.mixers.{entry['name']}"]
    lines += _option_lines(entry["config"])
    if entry["example"]:
        lines += ["", *_wrapped(example_words(entry["example"]), first="", rest="  ")]
    return "\n".join(lines)


def describe_group(group: dict[str, Any]) -> str:
    """Options of a whole model, as plain text."""
    lines = _wrapped(f"{group['name']}: {group['doc']}", first="", rest="  ")
    return "\n".join([*lines, "", *_option_lines(group["config"])])


def _option_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for option in rows:
        name, kind, default, doc = option_cells(option)
        head = f"{name} ({kind}, default {default})"
        lines += _wrapped(head, first="  ", rest="    ")
        lines += _wrapped(doc, first="      ", rest="      ")
    return lines


def _wrapped(text: str, *, first: str, rest: str) -> list[str]:
    return textwrap.wrap(text, 88, initial_indent=first, subsequent_indent=rest)


def kind_words(entry: dict[str, Any]) -> str:
    """Whether an entry is a mixer of its own or settings of another's slots."""
    if entry["kind"] == "preset":
        return "a choice of slots of `attention`"
    return "a mixer of its own"


def option_cells(option: dict[str, Any]) -> tuple[str, str, str, str]:
    """Name, type, default and meaning of one option as text."""
    default = "required" if option["required"] else json.dumps(option["default"])
    if option["default"] is None and not option["required"]:
        default = "none"
    return option["name"], option["type"], default, option["doc"]


def example_words(example: dict[str, Any]) -> str:
    """What one layer costs at the example size."""
    return (
        f"one layer at width {example['embed_dim']}, {example['num_heads']} heads, "
        f"{example['seq_len']} tokens: {example['parameters']:,} parameters, "
        f"{example['state']:,} elements of decode state, "
        f"{example['flops'] / 1e9:.2f} GFLOP forward"
    )


def markdown(told: list[dict[str, Any]]) -> str:
    """The whole catalog as docs/mechanisms.md."""
    lines = [
        "# Mechanisms",
        "",
        "Generated by `python -m attnjax.catalog --markdown docs/mechanisms.md`.",
        "",
        _markdown_row(COLUMNS),
        _markdown_row(["---"] * len(COLUMNS)),
    ]
    for entry in told:
        name, *rest = row(entry)
        link = f"[{name}](#{name})"
        lines.append(_markdown_row([link, *rest]))
    for entry in told:
        lines += ["", *_markdown_section(entry)]
    lines += ["", "# Options of a whole model"]
    for group in options.groups():
        lines += ["", f"### {group['name']}", group["doc"], ""]
        lines += _markdown_options(group["config"])
    return "\n".join(lines) + "\n"


def _markdown_section(entry: dict[str, Any]) -> list[str]:
    paper = ", ".join(filter(None, [entry["paper"], entry["source"]])) or "textbook"
    lines = [f"## {entry['name']}", f"{entry['title']} ({paper}); {kind_words(entry)}."]
    for name in ("limits", "deviations"):
        if entry[name]:
            lines += ["", f"{name.capitalize()}:"]
            lines += [f"- {sentence}" for sentence in entry[name]]
    if entry["config"]:
        lines += ["", *_markdown_options(entry["config"])]
    if entry["example"]:
        words = example_words(entry["example"])
        lines += ["", f"{words[0].upper()}{words[1:]}."]
    return lines


def _markdown_options(rows: list[dict[str, Any]]) -> list[str]:
    lines = [_markdown_row(["option", "type", "default", "meaning"])]
    lines.append(_markdown_row(["---"] * 4))
    for option in rows:
        name, *rest = option_cells(option)
        lines.append(_markdown_row([f"`{name}`", *rest]))
    return lines


def _markdown_row(cells) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _print_rich(told: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    # A narrow terminal keeps the columns that tell mechanisms apart.
    shown = COLUMNS if console.width >= 120 else COLUMNS[:5]
    table = Table(box=box.SIMPLE)
    for column in shown:
        table.add_column(column, no_wrap=column in ("name", "family", "paper"))
    for entry in told:
        table.add_row(*row(entry)[: len(shown)])
    console.print(table)
    console.print("python -m attnjax.catalog NAME tells everything about one.")


if __name__ == "__main__":
    run_main(main)

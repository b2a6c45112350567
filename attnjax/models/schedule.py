"""Layer schedules: "(lightning_attention*7 attention)*3" as a list of names.

Grammar: schedule = item+ ; item = (NAME | "(" schedule ")") ["*" COUNT].
A name is an instance of `config.model.mixers`, or a catalog name.
"""

import re

from attnjax.core.errors import UserError

_TOKEN = re.compile(
    r"\s*(?:(?P<name>[A-Za-z_][\w./-]*)|(?P<count>\d+)|(?P<mark>[()*]))"
)
MAX_LAYERS = 10_000  # A mistyped count ends in a message, not in a full memory.


def _fail(text: str, place: int, why: str) -> UserError:
    text = re.sub(r"\s", " ", text)  # One line, so that the caret points at it.
    return UserError(
        f"config.model.layers: {why}\n  {text}\n  {' ' * place}^\n"
        'Example: "(linear_attention*3 attention)*2".'
    )


def _tokens(text: str) -> list[tuple[str, str, int]]:
    tokens, place = [], 0
    while text[place:].strip():
        match = _TOKEN.match(text, place)
        if match is None:
            place += len(text[place:]) - len(text[place:].lstrip())
            raise _fail(text, place, f"unexpected {text[place]!r}.")
        kind = match.lastgroup
        tokens.append((kind, match.group(kind), match.start(kind)))
        place = match.end()
    return tokens


def parse(text: str) -> tuple[str, ...]:
    """One name per layer.

    Raises:
        UserError: with a caret under the place that does not parse.

    Example:
        >>> parse("(a*2 b)*2")
        ('a', 'a', 'b', 'a', 'a', 'b')
    """
    tokens = _tokens(text)
    names, rest = _sequence(text, tokens, 0, depth=0)
    if rest < len(tokens):
        raise _fail(text, tokens[rest][2], "this ')' closes nothing.")
    if not names:
        raise _fail(text, 0, "the schedule is empty.")
    return tuple(names)


def _sequence(text, tokens, at, *, depth) -> tuple[list[str], int]:
    names: list[str] = []
    while at < len(tokens):
        kind, word, place = tokens[at]
        if word == ")":
            break
        if kind == "name":
            item, at = [word], at + 1
        elif word == "(":
            item, at = _sequence(text, tokens, at + 1, depth=depth + 1)
            if at >= len(tokens):
                raise _fail(text, place, "this '(' is never closed.")
            if not item:
                raise _fail(text, place, "these parentheses hold nothing.")
            at += 1
        else:
            raise _fail(text, place, f"expected a mixer name or '('; got {word!r}.")
        count, place, at = _count(text, tokens, at)
        if len(names) + len(item) * count > MAX_LAYERS:
            raise _fail(text, place, f"a model has {MAX_LAYERS:,} layers or fewer.")
        names += item * count
    return names, at


def _count(text, tokens, at) -> tuple[int, int, int]:
    """(repeats, their place in the text, the token after them)."""
    if at >= len(tokens) or tokens[at][1] != "*":
        return 1, tokens[at - 1][2], at
    if at + 1 >= len(tokens) or tokens[at + 1][0] != "count":
        place = tokens[at + 1][2] if at + 1 < len(tokens) else len(text)
        raise _fail(text, place, "expected a number after '*'.")
    _, digits, place = tokens[at + 1]
    count = int(digits[:9])  # More digits are too many anyway.
    if count < 1:
        raise _fail(text, place, "a repeat count must be at least 1.")
    return count, place, at + 2


def expand(layers: str | tuple[str, ...], num_layers: int | None) -> tuple[str, ...]:
    """The schedule of the whole model: `layers` repeated to `num_layers`.

    Args:
        layers: a schedule string, or one name a layer.
        num_layers: depth; None means as long as the schedule.

    Raises:
        UserError: when the schedule does not fit num_layers a whole number of times.
    """
    names = parse(layers) if isinstance(layers, str) else tuple(layers)
    if not names:
        raise UserError("config.model.layers: must name at least one layer; got ().")
    if num_layers is None:
        return names
    if num_layers > MAX_LAYERS:
        raise UserError(
            f"config.model.num_layers: must be at most {MAX_LAYERS}; got {num_layers}."
        )
    if num_layers < 1 or num_layers % len(names):
        raise UserError(
            f"config.model.num_layers: must be a multiple of the schedule's "
            f"{len(names)} layers; got num_layers={num_layers}, layers={layers!r}. "
            "Set num_layers=none to take the schedule as it is."
        )
    return names * (num_layers // len(names))


def groups(names: tuple[str, ...]) -> tuple[tuple[tuple[str, ...], int], ...]:
    """Split a schedule in (pattern, repeats): each group becomes one scan.

    At every place the pattern that covers most layers by repetition is taken, the
    shortest of those; what does not repeat becomes groups of one layer.

    Example:
        >>> groups(("a", "a", "b", "a", "a", "b", "c"))
        ((('a', 'a', 'b'), 2), (('c',), 1))
    """
    found, at = [], 0
    while at < len(names):
        best_len, best_count = 1, 1
        for size in range(1, (len(names) - at) // 2 + 1):
            pattern, count = names[at : at + size], 1
            while names[at + size * count : at + size * (count + 1)] == pattern:
                count += 1
            if count > 1 and size * count > best_len * best_count:
                best_len, best_count = size, count
        found.append((names[at : at + best_len], best_count))
        at += best_len * best_count
    return tuple(found)

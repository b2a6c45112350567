"""A plan as lines for people."""

from attnjax.planning.planner import Plan, ProgramPlan

_SCALES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def size(value: float) -> str:
    """Bytes in GiB, MiB or KiB."""
    for unit, letter in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= unit:
            return f"{value / unit:.2f} {letter}"
    return f"{value:.0f} B"


def number(value: float) -> str:
    """A number with an SI prefix."""
    for unit, letter in _SCALES:
        if abs(value) >= unit:
            return f"{value / unit:.2f} {letter}"
    return f"{value:.0f} "


def count(value: float, unit: str) -> str:
    """A number of things: "1.31 M parameters", "3 loops", "1 loop"."""
    if value == 1:
        return f"1 {unit}"
    return f"{number(value).strip()} {unit}{'es' if unit.endswith('h') else 's'}"


def seconds(value: float) -> str:
    """A time in s, ms or us."""
    for unit, letter in ((1.0, "s"), (1e-3, "ms")):
        if value >= unit:
            return f"{value / unit:.2f} {letter}"
    return f"{value * 1e6:.1f} us"


def mesh_text(mesh: dict[str, int]) -> str:
    """The axes of a mesh that are larger than 1."""
    parts = [f"{axis}={count}" for axis, count in mesh.items() if count > 1]
    return " ".join(parts) or "one device"


def verdict(one: ProgramPlan) -> str:
    """Whether it fits, and by how much."""
    if one.fits is None:
        return f"did not compile: {one.compiled.error}"
    if one.fits:
        return f"fits, {size(one.spare)} to spare of {size(one.usable)} usable"
    return f"does not fit, by {size(-one.spare)} over {size(one.usable)} usable"


def lines(plan: Plan) -> list[str]:
    """The report of a plan."""
    kind = plan.target.chip.kind if plan.target.chip else "cpu"
    settings = plan.config
    out = [
        f"{plan.target.name}: {plan.target.count} x {kind}, mesh "
        f"{mesh_text(plan.mesh)}; {count(plan.parameters, 'parameter')}, "
        f"{plan.units:,} {plan.unit}s a step in "
        f"{count(settings['train']['accumulate'], 'micro-batch')}, {plan.dtype}, "
        f"remat={settings['model']['remat']}"
    ]
    if plan.matched is not None:
        out.append(plan.matched.line())
    out += _program("training step", plan.train, (plan.units, plan.unit))
    if plan.decode is None:
        out.append(f"decode step: not planned ({plan.decode_note})")
    else:
        out += _program(f"decode step, {plan.decode_note}", plan.decode, None)
    return out


def _program(title: str, one: ProgramPlan, step: tuple[int, str] | None) -> list[str]:
    compiled = one.compiled
    out = [f"{title}: {verdict(one)}"]
    parts = [("parameters", one.parameters), ("optimizer", one.optimizer)]
    parts += [("other state", one.state), ("inputs", one.inputs)]
    if compiled.is_compiled:
        parts.append(("activations and temporaries", compiled.temporaries))
    shown = [f"{name} {size(value)}" for name, value in parts if value]
    if one.total is not None:
        shown.append(f"total {size(one.total)}")
    out.append("  memory per device: " + ", ".join(shown))
    if one.costs is not None:
        products = f"{number(one.costs.flops)}FLOP in matrix products"
        if not one.costs.flops:
            products = "no matrix product (products with a vector became loops)"
        if one.costs.kernels:
            products += f", not counting {count(one.costs.kernels, 'kernel call')}"
        aside = ""
        if one.costs.apart:
            aside = f", {size(one.costs.apart)} of it by attention's stand-in"
        out.append(
            f"  per device: {products}, {size(one.costs.bytes)} of memory traffic"
            + aside
        )
        if one.costs.unknown_loops:
            out.append(
                f"  {count(one.costs.unknown_loops, 'loop')} whose length depends on "
                "data: counted as one turn"
            )
    if compiled.unread is not None:
        out.append(
            "  no FLOPs, traffic, collectives and times: this jaxlib cannot read the "
            f"compiled module ({compiled.unread})"
        )
    for row in one.collectives:
        across = f" in {row.nodes} nodes" if row.nodes > 1 else ""
        out.append(
            f"  {row.kind}: {size(row.bytes)} in {count(row.count, 'call')} among "
            f"{count(row.group, 'device')}{across}"
        )
    out += _times(one, step)
    out += [f"  {c.family.replace('_', ' ')} by {c}" for c in compiled.choices]
    out += [f"  kernel failed: {line}" for line in compiled.failed_kernels]
    out.append(f"  traced and compiled in {compiled.seconds:.1f} s")
    return out


def _times(one: ProgramPlan, step: tuple[int, str] | None) -> list[str]:
    """Speeds of a program that does so many units of a kind at a time."""
    guess = one.estimate
    if guess is None:
        if one.costs is None:
            return []
        return ["  time: not estimated (no peak speeds are known for this CPU)"]
    rate = ""
    if step is not None:
        count, unit = step
        rate = f", at most {number(count / guess.step).strip()} {unit}s/s"
    out = [
        f"  time: at least {seconds(guess.step)}{rate}, MFU at most "
        f"{100 * guess.mfu:.0f} % ({guess.method})",
        f"  bounds: compute {seconds(guess.compute)}, memory {seconds(guess.memory)}, "
        f"network {seconds(guess.network)}",
    ]
    return out
